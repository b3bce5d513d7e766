"""What tests of preparing data share: records, and what has become of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from autosft.profiles.dataset import (
    PreparedData,
    Split,
)

Write = Callable[[str, "str | bytes"], str]


SHARED = Path(os.environ.get("AUTOSFT_SHARED", Path(__file__).parents[4] / "shared"))


needs_shared_data = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="the shared data is not beside this checkout (AUTOSFT_SHARED)"
)


def alpaca(number: int) -> dict[str, str]:
    return {
        "instruction": f"Add one to {number}.",
        "input": "",
        "output": f"{number + 1}" + " ok" * (number % 7),
    }


def jsonl(records: Sequence[dict[str, Any]]) -> str:
    return "\n".join(map(json.dumps, records))


def rows(prepared: PreparedData, split: Split) -> Dataset:
    return load_from_disk(str(prepared.split_dir(split)))


def texts(prepared: PreparedData, split: Split) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    return [tokenizer.decode(ids) for ids in rows(prepared, split)["input_ids"]]
