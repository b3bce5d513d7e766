"""Output of the command line: live view, tables, progress."""
