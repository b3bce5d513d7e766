"""The processes that run items: start, adopt, stop, and how far they are."""
