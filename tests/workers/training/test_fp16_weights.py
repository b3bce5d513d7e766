"""Adapters over frozen fp16 weights: accelerate's loss scaler, on the CPU where it would leave it out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from autosft.profiles.model.adapters import chosen, hold_trained_in_fp32
from autosft.profiles.recipe import AdapterSettings, Precision
from autosft.studies.trial import Measurement
from autosft.workers.training.train import train
from autosft.workers.training.trainer import Trainer
from tests.workers.small import job, lora, make_data, make_model, pinned


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", ["lora", "ln_tuning"])
def test_what_is_trained_over_fp16_weights_is_fp32_and_learns_under_a_loss_scaler(
    kind: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    make, step = SFTTrainer.create_accelerator_and_postprocess, Trainer.training_step
    seen: set[tuple[bool, torch.dtype]] = set()

    def as_on_cuda(self: Any) -> None:
        make(self)
        self.accelerator.native_amp, self.accelerator.scaler = True, scaler

    def watched(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        seen.update((parameter.requires_grad, parameter.dtype) for parameter in self.model.parameters())
        return loss

    monkeypatch.setattr(SFTTrainer, "create_accelerator_and_postprocess", as_on_cuda)
    monkeypatch.setattr(Trainer, "training_step", watched)
    settings = replace(lora(), adapter=AdapterSettings(rank=4, alpha=8, targets="all-linear", **chosen(kind)))
    wanted = job(
        model, data, tmp_path, settings=settings, pinned=replace(pinned(data), precision=Precision.FP16)
    )
    reports: list[Measurement] = []
    end = train(wanted, reports.append, lambda: None)
    assert end.completed, end.message
    assert seen == {(True, torch.float32), (False, torch.float16)}
    assert scaler.get_scale() == 2.0**10  # no step was left out
    losses = [report.metric("eval_loss") for report in reports if report.is_evaluation]
    assert losses[-1] < losses[0]


def test_what_a_loss_scaler_cannot_take_is_made_fp32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).half(), torch.nn.Linear(2, 2).bfloat16())
    model[0].requires_grad_(False)
    hold_trained_in_fp32(model)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.float16] * 2 + [torch.float32] * 2
