"""The base model that an adapter's folder names: found from here or there, then known by its full path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import base_of, is_adapter_folder

BASES = ["llama", "../llama", "./llama", "{here}/llama"]


def adapter_on(base: str, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return str(folder)


@pytest.mark.parametrize("base", BASES)
def test_a_relative_base_means_the_same_from_everywhere(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained on it keeps this path, and is loaded from other folders."""
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    adapter_on(base.format(here=tmp_path), tmp_path / "adapter")

    assert base_of("adapter") == str(tmp_path / "llama")


def test_a_base_beside_the_adapter_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter/base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert base_of(adapter_on("base", tmp_path / "adapter")) == str(tmp_path / "adapter/base")


@pytest.mark.parametrize("base", ["./llama", "../llama", "/no/such/llama", "~/no-such-llama", ""])
def test_a_base_that_is_not_there_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is not there"):
        base_of(adapter_on(base, tmp_path / "adapter"))


def test_a_name_of_the_hub_stays_one(tmp_path: Path) -> None:
    assert base_of(adapter_on("owner/llama", tmp_path / "adapter")) == "owner/llama"


def test_an_adapter_on_an_adapter_is_refused_as_one_of_the_two_would_be_lost(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    first = adapter_on(str(tmp_path / "llama"), tmp_path / "first")
    with pytest.raises(UserError, match="which is an adapter itself") as error:
        base_of(adapter_on(first, tmp_path / "second"))
    assert "--merge" in (error.value.remedy or "")


def test_a_configuration_beside_an_adapter_does_not_make_it_a_model(tmp_path: Path) -> None:
    folder = adapter_on("owner/llama", tmp_path / "adapter")
    (tmp_path / "adapter/config.json").write_text("{}")  # of its base, as some programs write it

    assert is_adapter_folder(folder)
    assert base_of(folder) == "owner/llama"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
def test_an_adapter_beside_a_whole_model_is_refused(name: str, tmp_path: Path) -> None:
    folder = adapter_on("owner/llama", tmp_path / "adapter")
    for file in ("config.json", name):
        (tmp_path / "adapter" / file).write_text("{}")
    for ask in (is_adapter_folder, base_of):
        with pytest.raises(UserError, match="both an adapter"):
            ask(folder)
