"""Predict the peak memory of a training step before it runs."""

from autosft.profiles.memory.estimate import ModelConfig, estimate

__all__ = ["ModelConfig", "estimate"]
