"""A study's files: folders, checkpoints, and copies at a URL."""
