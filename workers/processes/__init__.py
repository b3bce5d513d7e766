"""A trial's process: starting it, its limits, its logs, how it failed."""
