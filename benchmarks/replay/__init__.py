"""Replays of searches over recorded learning curves: tables, searchers, a virtual clock, statistics."""
