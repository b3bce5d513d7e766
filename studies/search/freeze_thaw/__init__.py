"""Which trial to train on, or which settings to try next: freeze-thaw search over learning curves."""
