"""L0: registry, errors, sizes, random streams, console, files, the records that stages hand over."""
