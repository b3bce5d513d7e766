"""autosft: what fits, what learns best and which checkpoint to keep, on the GPUs you have.

Importing this package imports neither torch nor ray nor optuna.
"""

__version__ = "0.1.0"
