"""The queue in the study database."""
