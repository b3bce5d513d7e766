"""Training of a single configuration."""
