"""Recognise splits by the names of files, folders and records."""

from __future__ import annotations

import re
from typing import Final, Literal

SplitName = Literal["train", "validation", "test"]

#: The keywords of `datasets` for each split (its data_files.py, SPLIT_KEYWORDS).
_WORDS: Final[dict[str, SplitName]] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def split_of(name: str) -> SplitName | None:
    """Return the split that a name contains as a separate word, such as "test" in "gsm8k_test-00000".

    The last such word counts; None if there is none.
    """
    found = [_WORDS[word] for word in re.findall(r"[a-z]+", name.lower()) if word in _WORDS]
    return found[-1] if found else None
