"""Reads, recognises, checks, splits and tokenizes training data.

`prepare` is the way in; `PreparedData` is what it gives, and the functions beside it read that.
"""

from autosft.profiles.dataset.formats import DataFormat
from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.dataset.prepared import (
    PreparedData,
    SeqLenChoice,
    SourceShare,
    Split,
    SplitCounts,
    Truncation,
    choose_seq_len,
    describe,
    eval_fingerprint,
    length_profile,
    load_prepared,
    sample_with_mask,
    truncation_report,
)

__all__ = [
    "DataFormat",
    "PreparedData",
    "SeqLenChoice",
    "SourceShare",
    "Split",
    "SplitCounts",
    "Truncation",
    "choose_seq_len",
    "describe",
    "eval_fingerprint",
    "length_profile",
    "load_prepared",
    "prepare",
    "sample_with_mask",
    "truncation_report",
]
