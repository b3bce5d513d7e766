"""A record as its source contains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as its source contains it."""

    where: str  # "alpaca.jsonl line 214", "part-0.parquet row 12"
    fields: Mapping[str, Any]
    fills_nulls: bool = False  # from a columnar file, where every struct has the keys of all
    splits_left_out: tuple[str, ...] = ()  # other splits in its file
