"""Code that runs on a device: training, scoring and their processes."""
