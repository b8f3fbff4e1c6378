"""Commands that make tables, plots and a report from stored runs."""
