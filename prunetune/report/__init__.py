"""L4: what a person reads after a run: table, figures, model card, report.html. It measures nothing."""
