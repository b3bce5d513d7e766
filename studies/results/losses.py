"""Per-example losses and followed prompts, as trials save them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.studies.files.checkpoints import evaluation_path, trial_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleLosses:
    """Losses of a model on a study's evaluation examples, in the order of the data.

    loss_sums[i]   sum of the loss over the scored tokens of example i, in nats
    num_tokens[i]  number of scored tokens; 0 if truncation left none
    num_correct[i] number of scored tokens that were the model's first choice; empty in files of old versions
    """

    step: int
    loss_sums: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_correct: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per scored token, the `eval_loss` of a trial."""
        return math.fsum(self.loss_sums) / sum(self.num_tokens)


def read_losses(path: Path) -> ExampleLosses:
    """Read an evaluation's file (`checkpoints.evaluation_path`).  Raises UserError if it is broken."""
    try:
        plain = json.loads(path.read_text())
        return ExampleLosses(
            step=int(plain["step"]),
            loss_sums=tuple(float(value) for value in plain["loss_sums"]),
            num_tokens=tuple(int(value) for value in plain["num_tokens"]),
            num_correct=tuple(int(value) for value in plain.get("num_correct", ())),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold an evaluation: {error}.") from error


def losses_of(study_dir: Path, trial: int, evaluation: int) -> ExampleLosses | None:
    """Return the per-example losses of a trial's evaluation; None if the file no longer exists."""
    path = evaluation_path(trial_dir(study_dir, trial), evaluation)
    return read_losses(path) if path.is_file() else None


def read_passes(path: Path) -> tuple[bool, ...] | None:
    """Return the strict passes of a saved score; None if it is missing, broken, or was cut short."""
    try:
        plain = json.loads(path.read_text())
        return None if plain["is_raced"] else tuple(all(flags) for flags in plain["strict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
