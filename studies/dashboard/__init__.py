"""What Optuna's dashboard shows beside its own charts."""
