"""Facts with their sources: known devices and model shapes."""
