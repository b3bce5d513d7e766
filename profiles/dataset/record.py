"""One record as it stands in its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record as it stands in the source."""

    where: str  # "alpaca.jsonl line 214", "part-0.parquet row 12"
    fields: Mapping[str, Any]
    fills_nulls: bool = False  # of a columnar file, which gives every struct all keys that any of them has
    splits_left_out: tuple[str, ...] = ()  # other splits beside it in its file
