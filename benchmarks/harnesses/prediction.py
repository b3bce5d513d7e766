"""What a harness answers for a row of published measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


class NotPredictable(Exception):  # noqa: N818 - an answer, with its reason
    """The row leaves something open that decides the peak, or asks for what is not modelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted peaks of a row.

    `reserved_bytes` is None where only the sum of live tensors was traced.  `known_stack`: the versions of
    torch, transformers and peft that the source ran are the ones that were traced, so that the narrow bound
    holds; otherwise it is the wide one.
    """

    allocated_bytes: int
    reserved_bytes: int | None
    num_parameters: int
    known_stack: bool
    note: str = ""
