"""Fixtures: the `best.yaml` of a small study, for tests of what is done with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.dataset.prepared import PreparedData, tokens_fingerprint
from autosft.profiles.model.profile import load_model_profile
from autosft.studies.export import (
    DataSource,
    Expected,
    ExportedConfig,
    ModelSource,
)
from tests.workers.small import make_model, pinned, plan, settings

#: Optimizer steps of the study's runs.
NUM_STEPS = 8


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts with completions, and a cache."""
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    lines = [
        {"prompt": f"w{i} w{i + 1} ", "completion": " ".join(f"w{i + k}" for k in range(2, 3 + n))}
        for i in range(2, 20)
        for n in range(4)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosft.scheduler.train.config_inputs.cache_folder", lambda: home / "cache")


@pytest.fixture(scope="session")
def data(home: Path) -> PreparedData:
    profile = load_model_profile(str(home / "model"))
    return prepare(
        str(home / "data.jsonl"),
        model=str(home / "model"),
        cache_dir=home / "cache" / "data",
        max_positions=profile.max_positions,
    )


@pytest.fixture(scope="session")
def config(home: Path, data: PreparedData) -> ExportedConfig:
    return ExportedConfig(
        format=1,
        autosft="0.1.0",
        study='a "study" \\ of 🦙',
        trial=2,
        model=ModelSource(
            name=str(home / "model"), fingerprint=load_model_profile(str(home / "model")).fingerprint
        ),
        data=DataSource(
            source=str(home / "data.jsonl"),
            fingerprint=data.fingerprint,
            tokens_fingerprint=tokens_fingerprint(data),
        ),
        settings=settings(num_train_examples=8 * NUM_STEPS),
        pinned=pinned(data.path),
        expected=Expected(
            metric="eval_loss", value=1.5, step=8, num_tokens=500, final_value=1.5, peak_allocated_bytes=None
        ),
        plan=plan(micro_batch=2, effective_batch_size=8),
        environment={
            "hardware": {"devices": [{"name": "CPU", "kind": "cpu"}]},
            "packages": {"torch": "2.13"},
        },
    )
