"""Models: configuration, parameters, weight files, adapters, sparsity."""
