"""A simulation of PyTorch's caching allocator, with replays in C and Python."""
