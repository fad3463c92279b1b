"""L4: rows for training and validation, from files, folders, the hub or the documentation installed here."""
