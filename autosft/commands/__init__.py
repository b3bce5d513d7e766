"""The commands, a module each, with the typer application `app`."""
