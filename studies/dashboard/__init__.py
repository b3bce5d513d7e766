"""What Optuna's dashboard shows in addition to its own charts."""
