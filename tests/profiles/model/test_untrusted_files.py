"""Files of a model's folder that anybody may have made: refused in words, read within bounds, never run."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from autosft.profiles.errors import UserError
from autosft.profiles.json_files import read_json_object
from autosft.profiles.model.adapter_folder import read_config
from autosft.profiles.model.files import locate
from autosft.profiles.model.weight_keys import read_bin, read_header

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(header: object, *, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HEADERS = {
    "empty": b"",
    "cut": b"\x01\x00",
    "a length beyond the file": safetensors({}, length=1 << 40),
    "the largest length": safetensors({}, length=(1 << 64) - 1),
    "no length": safetensors({}, length=0),
    "not JSON": safetensors(b"{nothing"),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "a list": safetensors([1]),
    "nested deeply": safetensors(b"[" * 100_000),
    "a tensor that is text": safetensors({"w": "x"}),
    "no offsets": safetensors({"w": {"dtype": "F32", "shape": [2]}}),
    "offsets outside the file": safetensors({"w": {**TENSOR, "data_offsets": [0, 1 << 50]}}),
    "offsets backwards": safetensors({"w": {**TENSOR, "data_offsets": [8, 0]}}),
    "a negative shape": safetensors({"w": {**TENSOR, "shape": [-2]}}),
    "a shape of text": safetensors({"w": {**TENSOR, "shape": ["2"]}}),
    "a long integer": safetensors(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_header_is_refused_in_words_quickly_and_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"not a safetensors file|damaged"):
        read_header(path)
    assert time.process_time() - started < 10
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "kilobytes"


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"__metadata__": {"format": "pt"}, "w": TENSOR}))
    assert read_header(path) == {"w": TENSOR}


OBJECTS = {
    "empty": b"",
    "a list": b"[]",
    "text": b'"x"',
    "cut": b"{",
    "deep": b"[" * 100_000,
    "bytes": b"\xff",
}


@pytest.mark.parametrize("name", OBJECTS)
def test_broken_json_is_refused_in_words(tmp_path: Path, name: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(OBJECTS[name])
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_config(path)


def test_json_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "' + b"x" * 2000 + b'"}')
    assert read_json_object(path, remedy="")["a"]
    with pytest.raises(UserError, match="larger than"):
        read_json_object(path, remedy="", max_bytes=1000)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"w": 3}, {"w": None}], ids=repr)
def test_a_broken_index_is_refused_in_words(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00001.safetensors").write_bytes(safetensors({"w": TENSOR}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map"):
        locate(str(tmp_path), for_training=True)


class Witness:
    """Harmless: unpickling it would write a file, which shows that it was run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["code", "damaged", "no weights"])
def test_a_bin_file_runs_nothing_and_its_refusal_advises_nothing_unsafe(tmp_path: Path, kind: str) -> None:
    path, witness = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    if kind == "code":
        torch.save({"w": Witness(witness)}, path)
    elif kind == "damaged":
        torch.save({"w": torch.zeros(2)}, path)
        path.write_bytes(path.read_bytes()[:100])
    else:
        torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="cannot be read as weights") as raised:
        read_bin(path, map_location="cpu")
    assert not witness.exists()
    assert "weights_only" not in str(raised.value)
    assert ("could run code" in str(raised.value)) == (kind == "code")


def test_a_bin_file_of_weights_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "step": 3}, tmp_path / "pytorch_model.bin")
    assert list(read_bin(tmp_path / "pytorch_model.bin", map_location="cpu")) == ["w"]
