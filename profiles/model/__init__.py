"""What a model is: configuration, parameters, weights' files, adapters, sparsity."""
