"""What the command line shows: live view, tables, progress."""
