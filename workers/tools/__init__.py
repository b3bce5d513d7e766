"""Small jobs on models beside training."""
