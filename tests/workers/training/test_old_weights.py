"""Weights in torch's old format are read without running what a pickle says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autosft.workers.training.load import load_model
from tests.workers.small import job, make_data, make_model


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def with_old_weights(folder: Path, extra: dict[str, object]) -> Path:
    make_model(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **extra}, folder / "pytorch_model.bin")
    return folder


def test_a_pytorch_model_bin_is_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    modern, old = make_model(tmp_path / "modern"), with_old_weights(tmp_path / "old", {})
    one, other = (load_model(job(folder, data, tmp_path / "out")) for folder in (modern, old))
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_pickle_that_does_more_is_refused(tmp_path: Path) -> None:
    data, trap = make_data(tmp_path / "data"), tmp_path / "trap"
    folder = with_old_weights(tmp_path / "bad", {"extra": Malicious(trap)})
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|mkdir"):
        load_model(job(folder, data, tmp_path / "out"))
    assert not trap.exists()
