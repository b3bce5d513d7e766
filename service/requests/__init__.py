"""From what a request says to what may run: flags, folders, code, and a prediction of what it needs."""
