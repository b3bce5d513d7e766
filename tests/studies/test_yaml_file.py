"""Configuration files mean what they look like, whatever YAML 1.1 makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.export.config import read_config
from autosft.studies.request import TuneRequest, read_request
from autosft.studies.yaml_file import read_yaml


def request_of(folder: Path, line: str) -> TuneRequest:
    path = folder / "study.yaml"
    path.write_text(f"model: ./model\ndata: ./data.jsonl\n{line}\n", encoding="utf-8")
    return read_request({}, path)


MEANT: list[tuple[str, str, Any]] = [
    ("gpus: 0", "gpus", "0"),
    ("gpus: 0,1", "gpus", "0,1"),
    ("gpus: [0, 1]", "gpus", "0,1"),
    ("gpus: 010", "gpus", "010"),
    ("time_budget: 1:30", "time_budget", 5400.0),
    ("time-budget: 1:30", "time_budget", 5400.0),
    ("time_budget: 0:45", "time_budget", 2700.0),
    ("time_budget: 1:30:20", "time_budget", 5420.0),
    ("time_budget: 90", "time_budget", 90.0),
    ("time_budget: 2h", "time_budget", 7200.0),
    ("disk_budget: 20GB", "disk_budget", 20 * 10**9),
    ("disk_budget: 500000", "disk_budget", 500_000),
    ("study: 2026-11-30", "study", "2026-11-30"),
    ("study: no", "study", "no"),
    ("study: 0123", "study", "0123"),
    ("study: 1e3", "study", "1e3"),
    ("study: 12:30", "study", "12:30"),
    ("study: ~", "study", None),
    ("study:", "study", None),
    ("warm_start: off", "warm_start", "off"),
    ("prune: no", "prune", False),
    ("prune: off", "prune", False),
    ("skip_bad_records: yes", "skip_bad_records", True),
    ("skip_bad_records: on", "skip_bad_records", True),
    ("skip_bad_records: TRUE", "skip_bad_records", True),
    ("seed: 010", "seed", 10),
    ("seed: 0x10", "seed", 16),
    ("trials: 1_000", "trials", 1000),
    ("epochs: 3", "epochs", 3.0),
    ("epochs: 1e-1", "epochs", 0.1),
    ("epochs: .5", "epochs", 0.5),
    ("learning_rate: 1e-4", "space", {"learning_rate": 1e-4}),
    ("learning_rate: 2E-5", "space", {"learning_rate": 2e-5}),
    ("learning_rate: 1e-5..1e-3 log", "space", {"learning_rate": "1e-5..1e-3 log"}),
    ("space: {lora_rank: [8, 016]}", "space", {"lora_rank": [8, 16]}),
    ("data: [a.jsonl, b.parquet:2]", "data", "a.jsonl,b.parquet:2"),
]


@pytest.mark.parametrize(("line", "field", "meant"), MEANT, ids=[line for line, *_ in MEANT])
def test_a_value_is_what_it_looks_like(tmp_path: Path, line: str, field: str, meant: object) -> None:
    if line.startswith("data"):
        path = tmp_path / "study.yaml"
        path.write_text(f"model: ./model\n{line}\n")
        assert read_request({}, path).data == meant
    else:
        assert getattr(request_of(tmp_path, line), field) == meant


REFUSED = [
    ("trials: 1:30", "trials"),
    ("seed: 2026-11-30", "seed"),
    ("time_budget: 1:75", "not a positive duration"),
    ("time_budget: 1:2:3", "not a positive duration"),
    ("time_budget: soon", "not a positive duration"),
    ("epochs: .inf", "epochs"),
    ("seed: 1\nseed: 2", "line 4: the key 'seed' is given twice"),
    ("time-budget: 1h\ntime_budget: 2h", "line 4: the key 'time_budget' is given twice"),
    ("space: {lora_rank: 8, lora_rank: 16}", "line 3: the key 'lora_rank' is given twice"),
    ("seed: [1", "line 4"),
    ("seed: !!python/object:os.system 1", "line 3"),
]


@pytest.mark.parametrize(("line", "says"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_could_mean_another_thing_is_refused(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        request_of(tmp_path, line)
    assert says in str(error.value)


def test_a_file_in_the_encoding_of_powershell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("model: ./model\ndata: ./größe.jsonl\n", encoding="utf-16")
    assert read_request({}, path).data == "./größe.jsonl"


def test_another_encoding_is_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes("model: ./größe\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8") as error:
        read_request({}, path)
    assert "iconv" in (error.value.remedy or "")


def test_values_within_lists_and_anchors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffa: &x {b: 1.5, c: 'no'}\nd:\n  <<: *x\n  e: [yes, null, -3]\n", encoding="utf-8")

    assert read_yaml(path) == {
        "a": {"b": 1.5, "c": "no"},
        "d": {"b": 1.5, "c": "no", "e": ["yes", None, -3]},
    }


def aliased(depth: int) -> str:
    """Return lists of ten times the list before, by aliases: small as text, 10 ** depth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join(lines)


EXCESSES = {
    "nested lists": "[" * 2000 + "]" * 2000,
    "nested mappings": "".join("  " * n + f"k{n}:\n" for n in range(60)) + "  " * 60 + "x: 1",
    "aliases": aliased(9),
    "a merge of aliases": aliased(7) + "\nb:\n  <<: *a6",
    "itself": "a: &a [*a]",
    "a long integer": "a: " + "9" * 5000,
    "an integer beyond every float": "a: " + "9" * 400,
    "a long hexadecimal integer": "a: 0x" + "f" * 5000,
    "a large file": "# " + "x" * (1 << 20),
    "a tag of Python": "a: !!python/object/apply:os.getcwd []",
    "an unknown tag": "a: !x 1",
    "two documents": "a: 1\n---\nb: 2",
    "a key that is a list": "? [a]\n: 1",
    "control characters": "a: \x01",
}


@pytest.mark.parametrize("name", EXCESSES)
@pytest.mark.parametrize("read", [read_yaml, read_config], ids=["a request", "a configuration"])
def test_yaml_that_is_too_much_is_refused_in_words_and_quickly(
    tmp_path: Path, name: str, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(EXCESSES[name], encoding="utf-8")
    started = time.process_time()
    with pytest.raises(UserError, match=r"x\.yaml"):
        read(path)
    assert time.process_time() - started < 10


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\nc:\n  <<: &m {d: 4}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"d": 4}}
