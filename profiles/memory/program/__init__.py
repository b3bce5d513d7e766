"""A traced training step as numbers: allocation events whose sizes are polynomials of the shapes."""
