"""The model and the data of a configuration have to be those that it was found with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.train.config_inputs import read_inputs
from autosft.scheduler.train.overrides import Overrides, with_overrides
from autosft.studies.export import (
    ExportedConfig,
)

pytestmark = pytest.mark.usefixtures("cache")


def test_other_data_and_other_weights_are_refused(config: ExportedConfig, home: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.jsonl"
    lines = (home / "data.jsonl").read_text().splitlines(keepends=True)
    changed.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="is not the data"):
        read_inputs(with_overrides(config, Overrides(data=str(changed))))
    other = tmp_path / "other"
    shutil.copytree(home / "model", other)
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="is not the model"):
        read_inputs(with_overrides(config, Overrides(model=str(other))))


def test_the_same_tokens_under_another_fingerprint_are_the_same_data(
    config: ExportedConfig, home: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(home / "data.jsonl", moved)
    by_another_version = replace(config, data=replace(config.data, fingerprint="0" * 64))
    read_inputs(with_overrides(by_another_version, Overrides(data=str(moved))))
    unknown = replace(by_another_version, data=replace(by_another_version.data, tokens_fingerprint=""))
    with pytest.raises(UserError, match="is not the data"):
        read_inputs(unknown)
