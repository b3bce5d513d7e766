"""Faults of optimizers that neither loss nor log shows: mended, or the end of the trial.

    python -m tests.workers.training.optimizer_faults OUTPUT.json

In a process of its own, as `optimizer_runs`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from autosft.profiles.recipe import AdapterSettings, Method, Precision
from autosft.profiles.user_code import find
from autosft.studies.trial import FailureKind
from autosft.workers.device import device_of
from autosft.workers.processes.failures import failure_kind
from autosft.workers.training import load
from autosft.workers.training.applied_step import WrongStepError
from tests.workers.training.optimizer_runs import Ground, attempt, ground, state_bytes

USERS_TRAINER = """
from optimi import AdamW
from optimi.gradientrelease import prepare_for_gradient_release
from trl import SFTTrainer


class Released(SFTTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = AdamW(
            self.model.parameters(), lr=self.args.learning_rate, gradient_release=True
        )
        prepare_for_gradient_release(self.model, self.optimizer)
        return self.optimizer
"""


def schedule_free_warm_up(on: Ground) -> None:
    """Warm-up was applied twice: the schedule's, and again by the optimizer."""
    seen = attempt(on.job(optimizer="schedule_free_adamw", warmup_ratio=0.5, num_train_examples=40))
    applied = [float(group["scheduled_lr"]) for group in seen.optimizer.param_groups]
    assert applied == [seen.rates[-1]] * 2, (applied, seen.rates)
    assert {group["warmup_steps"] for group in seen.optimizer.param_groups} == {0}
    moved = [step / rate for step, rate in zip(seen.moved(), seen.rates, strict=True) if rate]
    assert max(moved) / min(moved) < 2.5, moved


def layerwise(on: Ground) -> None:
    """Every step has the base rate, from inside the backward pass: refused, and seen where it runs."""
    with pytest.raises(WrongStepError, match="holds 0 of 21 trained weights") as error:
        attempt(
            on.job(optimizer="galore_adamw_layerwise"),
            optim_target_modules=["q_proj", "up_proj"],
        )
    ends_the_trial(error.value, on)


def gradient_release(on: Ground) -> None:
    """After accelerate's prepare() the rate stays what it was at that moment; here it is 0 at first."""
    (on.folder / "released.py").write_text(USERS_TRAINER)
    with contextlib.chdir(on.folder):
        trainer = find("released:Released", flag="--trainer")
    job = on.job()
    with pytest.raises(WrongStepError, match="inside the backward pass") as error:
        attempt(replace(job, pinned=replace(job.pinned, trainer=trainer)))
    ends_the_trial(error.value, on)


def texts_for_booleans(on: Ground) -> None:
    """transformers takes "False" for true: bf16 weights got a compensation nobody asked for."""
    fields: dict[str, Any] = {"optimizer": "stable_adamw", "num_train_examples": 16}
    for text in ("False", "false", "0"):
        seen = attempt(
            on.job(precision=Precision.BF16, **fields), options=f"kahan_sum={text},decouple_lr={text}"
        )
        trained = list(seen.trainer.model.parameters())
        assert state_bytes(seen.optimizer) == sum(4 * one.numel() + 2 for one in trained), text
        assert not any(group["decouple_lr"] for group in seen.optimizer.param_groups), text


def another_trials_embeddings(on: Ground) -> None:
    """bitsandbytes' manager kept the embedding of a trial, and gave the next one's weights its moments."""
    from bitsandbytes.optim import GlobalOptimManager

    lora = {
        "method": Method.LORA,
        "adapter": AdapterSettings(rank=64, alpha=64.0, targets=("q_proj",)),
        "optimizer": "adamw_8bit",
        "num_train_examples": 16,
    }
    alone = attempt(on.job(**lora))
    attempt(on.job(optimizer="adamw_8bit", num_train_examples=16))
    manager = GlobalOptimManager.get_instance()
    assert not manager.module_weight_config_triple, "an embedding outlives its trial"
    after = attempt(on.job(**lora))
    assert state_bytes(after.optimizer) == state_bytes(alone.optimizer)
    dtypes = {state["state1"].dtype for state in after.optimizer.state.values()}
    assert dtypes == {torch.uint8}, dtypes


def assigned_tied_weights(on: Ground) -> None:
    """load_state_dict(assign=True) leaves two parameters over one memory: twice the rate on it."""
    load_base = load.load_base

    def assigned(*args: Any, **kwargs: Any) -> Any:
        model = load_base(*args, **kwargs)
        model.load_state_dict(model.state_dict(), assign=True)
        assert model.lm_head.weight is not model.get_input_embeddings().weight, "otherwise nothing is tested"
        return model

    right = attempt(on.job(is_tied=True, num_train_examples=16))
    with mock.patch.object(load, "load_base", assigned):
        seen = attempt(on.job(is_tied=True, num_train_examples=16))
    assert state_bytes(seen.optimizer) == state_bytes(right.optimizer)
    assert seen.moved() == right.moved()


def ends_the_trial(error: Exception, on: Ground) -> None:
    assert failure_kind(error, device_of(on.job())) is FailureKind.WRONG_STEP


CASES: tuple[Callable[[Ground], None], ...] = (
    schedule_free_warm_up,
    layerwise,
    gradient_release,
    texts_for_booleans,
    another_trials_embeddings,
    assigned_tied_weights,
)


def outcomes() -> dict[str, str]:
    """Return what went wrong in each case, as a traceback; nothing where it is as it has to be."""
    found = {}
    for case in CASES:
        with ground() as made:
            try:
                case(made)
                found[case.__name__] = ""
            except (Exception, pytest.fail.Exception):
                found[case.__name__] = traceback.format_exc()[-3000:]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(outcomes()))
