"""Trials' processes: how they are started, limited, logged, and how failures are classified."""
