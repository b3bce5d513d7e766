"""What a caching allocator makes of a program's allocations: replays in C and Python."""
