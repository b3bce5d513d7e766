"""Curves of real runs: curves.json holds what a small model reported that learns, does not, or overfits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autosft.studies.trial import Measurement

CURVES: dict[str, list[list[Any]]] = json.loads(
    Path(__file__).with_name("curves.json").read_text(encoding="utf-8")
)


def measurement(**fields: Any) -> Measurement:
    given: dict[str, Any] = {
        "trial": 3,
        "attempt": 1,
        "step": 0,
        "num_steps": 100,
        "num_tokens": 0,
        "loss": None,
        "grad_norm": None,
        "learning_rate": None,
        "tokens_per_s": None,
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
    }
    return Measurement(**{**given, **fields})


def curve(name: str) -> list[Measurement]:
    reports = []
    for step, num_steps, num_tokens, loss, norm, evaluation, eval_loss, elapsed_s in CURVES[name]:
        reports.append(
            measurement(
                step=step,
                num_steps=num_steps,
                num_tokens=num_tokens,
                loss=loss,
                grad_norm=norm,
                evaluation=evaluation,
                metrics=() if eval_loss is None else (("eval_loss", eval_loss),),
                elapsed_s=elapsed_s,
            )
        )
    return reports
