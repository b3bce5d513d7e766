"""Profiles of hardware, models and data; what fits, and how fast it trains."""
