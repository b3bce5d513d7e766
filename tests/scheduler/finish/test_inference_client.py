"""Whom questions are put to."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.finish.inference_client import InferenceClient, NamedModel
from autosft.studies.files.checkpoints import install


def test_a_damaged_checkpoint_is_not_asked(tmp_path: Path) -> None:
    staged, folder = tmp_path / "staged", tmp_path / "step-000010"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"weights")
    install(staged, folder)
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UserError, match="sha256 differs"):
        InferenceClient([NamedModel(name="best", source=str(folder))])
