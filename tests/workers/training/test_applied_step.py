"""A first step that is not the one that was asked for ends the trial with the cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from autosft.studies.trial import FailureKind
from autosft.workers.processes.failures import failed
from autosft.workers.training.applied_step import WrongStepError, shared_memory
from autosft.workers.training.train import train
from autosft.workers.training.trainer import Trainer
from tests.workers.small import job, make_data, make_model, settings

pytestmark = pytest.mark.slow

Change = Callable[[torch.optim.Optimizer, Any], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def remember_rate(optimizer: torch.optim.Optimizer, _: Any) -> None:
    def step(*_: Any, **__: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2

    optimizer.register_step_pre_hook(step)


def leave_out(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.param_groups[0]["params"].pop(0)


def hold_twice(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"][0])


def step_in_backward(_: torch.optim.Optimizer, model: Any) -> None:
    def step(weight: torch.Tensor) -> None:
        with torch.no_grad():
            weight.sub_(1e-4)

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(step)


def warm_up_by_share(optimizer: torch.optim.Optimizer, _: Any) -> None:
    """Let the first step be 20 times the rate asked for, as a warm-up of 0.05 steps does."""
    before: list[torch.Tensor] = []
    weights = [one for group in optimizer.param_groups for one in group["params"]]

    def keep(*_: Any, **__: Any) -> None:
        before[:] = [one.detach().clone() for one in weights]

    def further(*_: Any, **__: Any) -> None:
        with torch.no_grad():
            for one, was in zip(weights, before, strict=True):
                one.add_(19 * (one - was))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(further)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    change: Change
    warmup_ratio: float = 0.0
    words: str


CASES = {
    "a rate remembered from before, in warm-up": Case(
        change=remember_rate, warmup_ratio=0.25, words="at a rate of 0 the first step moved"
    ),
    "a weight that no optimizer holds": Case(change=leave_out, words="holds 20 of 21 trained weights"),
    "a weight held twice": Case(change=hold_twice, words="in the optimizer twice"),
    "a step inside the backward pass": Case(change=step_in_backward, words="inside the backward pass"),
    "a share of warm-up taken for steps": Case(change=warm_up_by_share, words="a rate above the"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_another_step_than_asked_for_ends_the_attempt(
    case: Case, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Trainer.create_optimizer

    def changed(self: Trainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = create(self, model)
        case.change(optimizer, self.model)
        return optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", changed)
    what = job(model, data, tmp_path, settings=settings(warmup_ratio=case.warmup_ratio))
    with pytest.raises(WrongStepError, match=case.words):
        train(what, lambda _: None, lambda: None)


def test_a_schedule_that_is_not_the_settings_is_seen(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autosft.workers.training import train as module

    config = module.sft_config

    def constant(*args: Any, **kwargs: Any) -> Any:
        made = config(*args, **kwargs)
        made.lr_scheduler_type, made.warmup_steps = "constant", 0
        return made

    monkeypatch.setattr(module, "sft_config", constant)
    with pytest.raises(WrongStepError, match=r"rate at step 1 is 0\.01, the schedule's 0\."):
        train(job(model, data, tmp_path, settings=settings(warmup_ratio=0.25)), lambda _: None, lambda: None)


def test_two_weights_in_one_memory_are_seen() -> None:
    whole = torch.zeros(4, 6)
    apart = {"top": whole[:2], "bottom": whole[2:], "other": torch.zeros(3), "none": torch.zeros(0)}
    assert shared_memory(apart.items()) is None
    assert shared_memory({**apart, "row": whole[3]}.items()) == ("bottom", "row")
    assert set(shared_memory({"a": whole, "b": whole.view(-1)}.items()) or ()) == {"a", "b"}


def test_it_is_a_failure_of_its_own(model: Path, data: Path, tmp_path: Path) -> None:
    what = job(model, data, tmp_path)
    end = failed(what, WrongStepError("twice the rate"), tmp_path / "log", 1.0, None)
    assert end.failure is FailureKind.WRONG_STEP
    assert "twice the rate" in end.message
