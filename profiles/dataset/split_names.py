"""Recognise splits by the names of files, folders and records."""

from __future__ import annotations

import re
from typing import Final, Literal

SplitName = Literal["train", "validation", "test"]

#: The keywords of `datasets` for each split (its data_files.py, SPLIT_KEYWORDS), and two more.
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
    "holdout": "test",
    "heldout": "test",
}
#: What such a word is run together with: "testset", "devdata".
_JOINED: Final = re.compile(rf"({'|'.join(_WORDS)})(?:set|data|split)")


def split_of(name: str) -> SplitName | None:
    """Return the split that a name contains as a separate word, such as "test" in "gsm8k_test-00000".

    The last such word counts; None if there is none.
    """
    words = re.findall(r"[a-z]+", name.lower().replace("held_out", "heldout").replace("held-out", "heldout"))
    parts = [joined[1] if (joined := _JOINED.fullmatch(word)) else word for word in words]
    found = [_WORDS[part] for part in parts if part in _WORDS]
    return found[-1] if found else None
