"""One configuration trained to its end."""
