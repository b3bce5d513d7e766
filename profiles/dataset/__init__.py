"""Read, recognise, check, split and tokenize training data.

`prepare` is the entry point; it returns `PreparedData`, which the other functions read.
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
    eval_fingerprint,
    length_profile,
    load_prepared,
    sample_with_mask,
    truncation_report,
)
from autosft.profiles.dataset.prepared_summary import describe

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
