"""A folder that is a model at its top, installed from a checkpoint below it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.files.checkpoints import MANIFEST, checkpoint_dir, install, verify
from autosft.studies.files.model_folder import install_model


def checkpoint(folder: Path, step: int, files: dict[str, str]) -> Path:
    staged = folder / f"staged-{step}"
    for name, content in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(content)
    place = checkpoint_dir(folder, step)
    install(staged, place)
    return place


TRAINING = {"optimizer.pt": "o", "scheduler.pt": "s", "rng_state.pth": "r", "trainer_state.json": "t"}


def sealed(folder: Path) -> set[str]:
    return set(json.loads((folder / MANIFEST).read_text())["files"])


def test_what_loads_is_at_the_top_and_what_trains_is_not(tmp_path: Path) -> None:
    model = {"model.safetensors": "1", "config.json": "c", "a/b.py": "x"}
    first = checkpoint(tmp_path, 10, {**model, **TRAINING})
    (tmp_path / "run.json").write_text("{}")
    install_model(first, tmp_path)
    assert sealed(tmp_path) == set(model)
    verify(tmp_path)
    assert not (tmp_path / "optimizer.pt").exists()
    assert (tmp_path / "run.json").exists(), "what else lies there stays"
    verify(first)


def test_another_best_takes_the_place_of_the_first(tmp_path: Path) -> None:
    install_model(checkpoint(tmp_path, 10, {"model-1.safetensors": "1", "config.json": "c"}), tmp_path)
    install_model(checkpoint(tmp_path, 20, {"model.safetensors": "2", "config.json": "d"}), tmp_path)
    assert not (tmp_path / "model-1.safetensors").exists()
    assert (tmp_path / "model.safetensors").read_text() == "2"
    verify(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        verify(tmp_path)


def test_installing_again_leaves_nothing_half_done(tmp_path: Path) -> None:
    """Where both names are links of one file, renaming one to the other does nothing."""
    first = checkpoint(tmp_path, 10, {"model.safetensors": "1", "config.json": "c"})
    install_model(first, tmp_path)
    install_model(first, tmp_path)
    verify(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert not list(tmp_path.glob("*.partial"))


def test_without_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    install_model(checkpoint(tmp_path, 10, {"model.safetensors": "1"}), tmp_path)
    verify(tmp_path)
