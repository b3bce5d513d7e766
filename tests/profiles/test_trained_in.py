"""The folder that `autosft train --output` writes, and a trial's, given where a model is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.sources import trained_in


def run_folder(folder: Path, *steps: int, is_of_train: bool = False) -> Path:
    for step in steps:
        (folder / f"checkpoints/step-{step:06}").mkdir(parents=True)
    if is_of_train:
        (folder / "run.json").write_text("{}")
    return folder


def test_the_only_checkpoint_of_a_trial_and_the_last_of_a_training(tmp_path: Path) -> None:
    trial = run_folder(tmp_path / "trial", 7)
    trained = run_folder(tmp_path / "trained", 2, 11, is_of_train=True)

    assert trained_in(str(trial)) == str(trial / "checkpoints/step-000007")
    assert trained_in(str(trained)) == str(trained / "checkpoints/step-000011")


def test_one_of_several_is_not_chosen_in_silence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 2 checkpoints(.|\n)*step-000004"):
        trained_in(str(run_folder(tmp_path, 3, 4)))


def test_anything_else_stays_as_it_is(tmp_path: Path) -> None:
    model = run_folder(tmp_path / "model", 3)
    (model / "config.json").write_text("{}")

    assert trained_in(str(model)) == str(model)
    assert trained_in("owner/name") == "owner/name"
    assert trained_in(str(tmp_path)) == str(tmp_path)
