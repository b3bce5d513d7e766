"""Reads, recognises, checks and tokenizes training data."""
