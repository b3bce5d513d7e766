"""Traced training steps as allocation events whose sizes are polynomials of the batch's shape."""
