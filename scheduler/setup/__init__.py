"""From a request to a study that is ready to run."""
