"""Names that say which split of a data set a file, a folder or a record belongs to."""

from __future__ import annotations

import re
from typing import Final, Literal

SplitName = Literal["train", "validation", "test"]

#: The words that `datasets` knows for each split (its data_files.py, SPLIT_KEYWORDS).
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
    """Return the split that a name speaks of in a word of its own: "gsm8k_test-00000" is of the test split.

    The last such word counts; None where there is none.
    """
    found = [_WORDS[word] for word in re.findall(r"[a-z]+", name.lower()) if word in _WORDS]
    return found[-1] if found else None
