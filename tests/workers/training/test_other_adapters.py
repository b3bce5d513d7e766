"""Adapters other than LoRA through our trainer: trained, saved, gone on with, and loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles.model.adapters import chosen
from autosft.profiles.recipe import AdapterSettings, Method
from autosft.studies.trial import Measurement
from autosft.workers.training.train import train
from tests.workers.small import job, make_data, make_model, plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "kind",
    [
        "ia3",
        "prompt_tuning,num_virtual_tokens=4",
        "oft,oft_block_size=4",
        "boft,boft_block_size=4",
        "psoft",
        "unilora",
        "waveft,n_frequency=64",
    ],
)
def test_an_adapter_trains_and_its_checkpoint_loads(
    kind: str, model: Path, data: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    wanted = job(model, data, tmp_path, plan=plan(micro_batch=4, effective_batch_size=8))
    lora = AdapterSettings(rank=4, alpha=8, targets="all-linear", **chosen(kind))
    wanted = replace(wanted, settings=replace(wanted.settings, method=Method.LORA, adapter=lora))
    reports: list[Measurement] = []
    end = train(wanted, reports.append, lambda: None)
    assert end.completed, end.message
    saved = [report.checkpoint for report in reports if report.checkpoint is not None][-1]
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved)
    assert sum(parameter.numel() for parameter in loaded.parameters()) > 0
    assert loaded.peft_config["default"].peft_type.value.lower() == kind.partition(",")[0]
