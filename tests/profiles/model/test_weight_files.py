"""Which files of a folder hold its weights: those that transformers reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autosft.profiles.errors import UserError
from autosft.profiles.model.files import locate

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMED = ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors")


@dataclass(frozen=True, kw_only=True)
class Case:
    case: str
    there: tuple[str, ...]
    read: tuple[str, ...]


CASES = [
    Case(case="one file", there=(WHOLE,), read=(WHOLE,)),
    Case(case="shards", there=(INDEX, *SHARDS), read=SHARDS),
    Case(case="shards by other names", there=(INDEX, *NAMED), read=NAMED),
    Case(case="Mistral's own format beside it", there=(WHOLE, "consolidated.safetensors"), read=(WHOLE,)),
    Case(case="beside shards", there=(INDEX, *SHARDS, "consolidated.safetensors"), read=SHARDS),
    Case(case="another precision beside it", there=(WHOLE, "model.fp16.safetensors"), read=(WHOLE,)),
    Case(case="older shards left over", there=(WHOLE, *SHARDS), read=(WHOLE,)),
]


def make(folder: Path, names: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    for name in names:
        if name.endswith(".json"):
            shards = [other for other in names if "-of-" in other]
            (folder / name).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
        else:
            save_file({name: torch.zeros(2)}, folder / name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.case)
def test_the_weights_are_those_that_transformers_reads(case: Case, tmp_path: Path) -> None:
    make(tmp_path, case.there)

    located = locate(str(tmp_path), for_training=True)
    assert tuple(name for name, _ in located.weights) == case.read


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "model.fp16.safetensors", "consolidated.safetensors"]
)
def test_weights_by_another_name_are_refused_with_the_names_that_are_read(name: str, tmp_path: Path) -> None:
    make(tmp_path, (name,))

    with pytest.raises(UserError, match=f"only {name}.*\n.*model.safetensors or pytorch_model.bin"):
        locate(str(tmp_path), for_training=True)


def test_the_folder_of_a_run_names_its_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "run", ())
    (tmp_path / "run/config.json").unlink()
    make_checkpoint = tmp_path / "run/checkpoints/step-000002"
    make_checkpoint.mkdir(parents=True)

    with pytest.raises(UserError, match=f"give {make_checkpoint}"):
        locate(str(tmp_path / "run"), for_training=True)
