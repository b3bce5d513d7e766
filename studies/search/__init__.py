"""The search space, and which settings a trial gets."""
