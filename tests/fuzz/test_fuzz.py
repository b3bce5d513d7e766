"""Whatever a foreign file holds: it is read, or refused in words; never a bug, and never for long.

make fuzz                                            two minutes
AUTOSFT_FUZZ_S=600 .venv/bin/python -m pytest -m fuzz    ten minutes each
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from autosft.profiles.dataset.problems import Problems
from autosft.profiles.dataset.read_examples import read_sources
from autosft.profiles.dataset.remarks import Remarks
from autosft.profiles.dataset.sources import open_sources
from autosft.profiles.errors import StorageError, StudyFailedError, UserError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.discover import load_profile, save_profile
from autosft.profiles.model.adapter_folder import settings_of
from autosft.profiles.model.files import locate
from autosft.profiles.model.weight_keys import read_bin, read_header
from autosft.studies.export import exported, read_config, write_config
from autosft.studies.files.checkpoints import seal, verify
from autosft.studies.request import read_request
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from tests.fuzz.mutations import CHANGES, VALUES, changed
from tests.scheduler.devices import gpu
from tests.studies.study_examples import end, evaluation, opened, start

pytestmark = pytest.mark.fuzz

#: How long each target is tried.
SECONDS = float(os.environ.get("AUTOSFT_FUZZ_S", "8"))
#: Processor time that reading one file may take.
LIMIT_S = 10.0
IN_WORDS = (UserError, StorageError, StudyFailedError)


def fuzz(strategy: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
    """Hand `read` what the strategy makes, for SECONDS; only errors in words may come of it."""

    def attempt(made: Any) -> None:
        started = time.process_time()
        with contextlib.suppress(*IN_WORDS):
            read(made)
        assert time.process_time() - started < LIMIT_S

    deadline, number = time.monotonic() + SECONDS, int(time.time())
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    while time.monotonic() < deadline:
        number += 1
        bounded = settings(max_examples=200, deadline=None, database=None, suppress_health_check=checks)
        seed(number)(bounded(given(strategy)(attempt)))()


def in_place(plain: Any, path: list[float], value: Any) -> Any:
    """Return JSON-like values with one of them, found by going down by shares, replaced."""
    plain = copy.deepcopy(plain)
    here = plain
    for number, share in enumerate(path):
        keys = (
            list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
        )
        if not keys:
            break
        key = keys[min(int(share * len(keys)), len(keys) - 1)]
        if number == len(path) - 1 or not isinstance(here[key], dict | list):
            here[key] = value
            break
        here = here[key]
    return plain


ANYWHERE = st.tuples(st.lists(st.floats(0, 1), min_size=1, max_size=5), VALUES)


# --- configuration and YAML ---------------------------------------------------------------------------

REQUEST = b"""model: ./llama
data: [chats.jsonl, more.parquet]
trials: 24
learning-rate: 1e-5..1e-3 log
time-budget: 3h
effective-batch-size: [8, 16]
method: lora
"""


def test_requests(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"

    def read(changes: Any) -> None:
        path.write_bytes(changed(REQUEST, changes))
        read_request({}, path)

    fuzz(CHANGES, read)


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    with closing(open_records(f"sqlite:///{tmp_path / 'studies.db'}")) as records:
        study = opened(records)
        study.ask(now=0.0)
        start(study, 0)
        study.record(evaluation(0, 1, 1, 1.5), now=1.0)
        study.end_attempt(end(0, 1), TrialState.COMPLETED, now=2.0)
        write_config(tmp_path / "best.yaml", exported(study.spec, study.trial(0)))
    return tmp_path / "best.yaml"


def test_exported_configurations(configuration: Path) -> None:
    good = configuration.read_bytes()
    plain = yaml.safe_load(good)

    def read(made: Any) -> None:
        if isinstance(made, list):
            configuration.write_bytes(changed(good, made))
        else:
            configuration.write_text(yaml.safe_dump(in_place(plain, *made)), encoding="utf-8")
        read_config(configuration)

    fuzz(CHANGES | ANYWHERE, read)


def test_hardware_profiles(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    save_profile(ClusterProfile(devices=(gpu(),), driver_version=None, cuda_version=None), path)
    plain = json.loads(path.read_text())

    def read(made: Any) -> None:
        path.write_text(json.dumps(in_place(plain, *made)), encoding="utf-8")
        load_profile(path)

    fuzz(ANYWHERE, read)


# --- data ---------------------------------------------------------------------------------------------

RECORDS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "tools": [{"name": "f"}]},
    {"text": "only text"},
]
FILES = {
    "jsonl": "\n".join(json.dumps(record) for record in RECORDS[:1] * 3).encode(),
    "json": json.dumps(RECORDS[2:3] * 3).encode(),
    "csv": b'instruction,input,output\nAdd,1 2,3\n"a,\nb",,c\n',
    "tsv": b"prompt\tcompletion\na\tb\n",
    "txt": b"one\n\ntwo\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_data_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"

    def read(changes: Any) -> None:
        path.write_bytes(changed(FILES[kind], changes))
        read_data(path)

    fuzz(CHANGES, read)


def read_data(path: Path) -> None:
    read_sources(open_sources(str(path)), Problems(skip=True), Remarks(), max_rounds=2)


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"

    def read(made: Any) -> None:
        record, where = made
        path.write_text(
            json.dumps(in_place(record, *where)) + "\n" + json.dumps(record) + "\n", encoding="utf-8"
        )
        read_data(path)

    fuzz(st.tuples(st.sampled_from(RECORDS), ANYWHERE), read)


def test_data_cards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(FILES["jsonl"])
    card = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.jsonl"}]}]
    }

    def read(made: Any) -> None:
        text = yaml.safe_dump(in_place(card, *made), allow_unicode=True)
        (tmp_path / "README.md").write_text(f"---\n{text}---\n", encoding="utf-8", errors="replace")
        read_data(tmp_path)

    fuzz(ANYWHERE, read)


# --- checkpoints --------------------------------------------------------------------------------------


def test_weight_files(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1)}, tmp_path / "good.safetensors")
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "good.bin")
    good = {suffix: (tmp_path / f"good.{suffix}").read_bytes() for suffix in ("safetensors", "bin")}

    def read(made: Any) -> None:
        suffix, changes = made
        path = tmp_path / f"model.{suffix}"
        path.write_bytes(changed(good[suffix], changes))
        if suffix == "bin":
            read_bin(path, map_location="cpu")
        else:
            read_header(path)

    fuzz(st.tuples(st.sampled_from(sorted(good)), CHANGES), read)


def test_model_folders(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 3}, "weight_map": {"a": "model-00001.safetensors"}}
    adapter = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(4)

    def read(made: Any) -> None:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (tmp_path / "m").mkdir()
        name, where = made
        content = {"index": index, "adapter": adapter}
        content[name] = in_place(content[name], *where)
        (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(content["adapter"]))
        if name == "adapter":
            settings_of(tmp_path / "m")
            return
        (tmp_path / "m" / "config.json").write_text("{}")
        (tmp_path / "m" / "tokenizer.json").write_text("{}")
        (tmp_path / "m" / "model-00001.safetensors").write_bytes(weights)
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(content["index"]))
        locate(str(tmp_path / "m"), for_training=True)

    fuzz(st.tuples(st.sampled_from(["index", "adapter"]), ANYWHERE), read)


def test_manifests(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    seal(tmp_path)
    manifest = tmp_path / "manifest.json"
    good = manifest.read_bytes()
    plain = json.loads(good)

    def read(made: Any) -> None:
        if isinstance(made, list):
            manifest.write_bytes(changed(good, made))
        else:
            manifest.write_text(json.dumps(in_place(plain, *made)))
        verify(tmp_path)

    fuzz(CHANGES | ANYWHERE, read)


# --- database rows ------------------------------------------------------------------------------------

COLUMNS = {
    "autosft_studies": ["spec", "num_trials", "name"],
    "autosft_trials": [
        "settings",
        "plan",
        "parameters",
        "state",
        "failure",
        "value",
        "origin",
        "best_checkpoint",
    ],
    "autosft_attempts": ["plan", "device_uuids", "outcome", "message"],
    "autosft_measurements": ["metrics", "checkpoint", "loss", "evaluation"],
}
CELLS = st.sampled_from([(table, column) for table, columns in COLUMNS.items() for column in columns])


def test_database_rows(configuration: Path) -> None:
    good, path = configuration.with_name("studies.db"), configuration.with_name("fuzzed.db")

    def read(made: Any) -> None:
        (table, column), (where, value), is_whole = made
        shutil.copy(good, path)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            [now] = connection.execute(f"SELECT {column} FROM {table}").fetchone()
            if not is_whole and isinstance(now, str) and now.startswith(("{", "[")):
                value = json.dumps(in_place(json.loads(now), where, value))
            elif not isinstance(value, str | float | None):
                value = json.dumps(value)
            try:
                connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
            except (sqlite3.Error, UnicodeEncodeError, OverflowError):
                return  # the database itself refuses it
        with closing(open_records(f"sqlite:///{path}")) as records:
            for overview in records.studies():
                study = records.read_study(overview.spec.name)
                study.trials()
                study.checkpoints()
                study.attempts()
                study.progress(0)

    fuzz(st.tuples(CELLS, ANYWHERE, st.booleans()), read)


def test_database_files(configuration: Path) -> None:
    good, path = configuration.with_name("studies.db"), configuration.with_name("fuzzed.db")
    with closing(sqlite3.connect(good)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = good.read_bytes()

    def read(changes: Any) -> None:
        for left in path.parent.glob("fuzzed.db*"):
            left.unlink()
        path.write_bytes(changed(content, changes))
        with closing(open_records(f"sqlite:///{path}")) as records:
            for overview in records.studies():
                records.read_study(overview.spec.name)

    fuzz(CHANGES, read)
