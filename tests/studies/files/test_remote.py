"""Folders at a URL: whole or not there, and nobody else's."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from autosft.profiles import errors
from autosft.profiles.errors import UserError
from autosft.studies.files import remote, storage
from autosft.studies.files.checkpoints import MANIFEST, checkpoint_url, seal, trial_url, verify
from autosft.studies.store.records import Records
from autosft.studies.trial import Contents
from tests.studies.study_examples import evaluation, opened, start

MEMORY = fsspec.filesystem("memory")
CONTENTS = Contents(num_bytes=7, sha256="0" * 64, has_resume_state=True)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(storage, "WAITS_S", (0.0, 0.0))
    url = f"memory://{uuid.uuid4().hex}/studies"
    yield url
    MEMORY.store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000010"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "nested" / "state.json").write_text("{}")
    seal(folder)
    return folder


def test_what_is_fetched_is_what_was_uploaded(store: str, folder: Path, tmp_path: Path) -> None:
    MEMORY.makedirs(store)
    parts: list[int] = []
    remote.upload(folder, f"{store}/one", on_progress=lambda: parts.append(1))
    seen: list[tuple[int, int]] = []
    remote.download(
        f"{store}/one", tmp_path / "here", on_progress=lambda done, total: seen.append((done, total))
    )
    verify(tmp_path / "here")
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == b"weights" * 1000
    assert len(parts) == 2
    assert seen[-1] == (7002, 7002)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_manifest_comes_last_and_goes_first(
    store: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    memory = type(MEMORY)
    for name in ("rm", "_open"):
        real = getattr(memory, name)

        def noted(self, path, *given, _real=real, _name=name, **named):  # type: ignore[no-untyped-def]
            order.append(f"{_name} {str(path).rpartition('/')[2]}")
            return _real(self, path, *given, **named)

        monkeypatch.setattr(memory, name, noted)
    remote.upload(folder, f"{store}/one")
    assert order[-1] == f"_open {MANIFEST}"
    order.clear()
    remote.remove(f"{store}/one")
    assert order[0] == f"rm {MANIFEST}"
    assert not remote.exists(f"{store}/one")


def test_an_upload_that_is_cut_short_is_not_a_checkpoint_and_is_swept(
    store: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trial = trial_url(store, 3)
    reported, lost, half = (checkpoint_url(trial, attempt, 10) for attempt in (1, 2, 3))
    for item in (reported, lost):
        remote.upload(folder, item)

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        remote.upload(folder, half, on_progress=die)
    assert not remote.exists(half)
    with pytest.raises(errors.StorageError, match="could not be fetched"):
        remote.download(half, tmp_path / "here")
    found = remote.strays(store, known={reported}, running=set())
    assert list(found) == [lost, half]
    assert list(remote.strays(store, known={reported}, running={3})) == []
    remote.sweep(store, known={reported}, running=set())
    remote.settle()
    assert list(remote.strays(store, known=set(), running=set())) == [reported]
    assert remote.exists(reported)


def test_what_is_not_what_was_written_is_refused(store: str, folder: Path, tmp_path: Path) -> None:
    remote.upload(folder, f"{store}/one")
    MEMORY.pipe_file(f"{store}/one/model.safetensors", b"WEIGHTS" * 1000)
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        remote.download(f"{store}/one", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_manifest_cannot_name_files_elsewhere(store: str, folder: Path, tmp_path: Path) -> None:
    remote.upload(folder, f"{store}/one")
    files = {"../../evil": {"bytes": 1, "sha256": "0"}}
    MEMORY.pipe_file(f"{store}/one/{MANIFEST}", json.dumps({"version": 1, "files": files}).encode())
    with pytest.raises(UserError, match="outside of its folder"):
        remote.download(f"{store}/one", tmp_path / "here")


def test_a_network_that_comes_back_costs_nothing_and_one_that_does_not_is_reported(
    store: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(MEMORY)
    real, left = memory.pipe_file, [2]

    def flaky(self, *given, **named):  # type: ignore[no-untyped-def]
        if left[0] > 0:
            left[0] -= 1
            raise ConnectionError("reset by peer")
        return real(self, *given, **named)

    monkeypatch.setattr(memory, "pipe_file", flaky)
    remote.upload(folder, f"{store}/one")
    assert remote.exists(f"{store}/one")
    left[0] = 3
    with pytest.raises(errors.StorageError, match=r"could not be uploaded to memory://.*reset by peer"):
        remote.upload(folder, f"{store}/two")


def test_the_cache_holds_the_last_few(store: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    for number in range(remote.NUM_CACHED + 2):
        remote.upload(folder, f"{store}/{number}")
        verify(remote.fetched(f"{store}/{number}"))
    here = list((folder.parent / "cache" / "autosft" / "checkpoints").glob("*/*/manifest.json"))
    assert len(here) == remote.NUM_CACHED
    MEMORY.rm(f"{store}/{remote.NUM_CACHED + 1}", recursive=True)
    verify(remote.fetched(f"{store}/{remote.NUM_CACHED + 1}"))
    assert remote.fetched(str(folder)) == folder


@pytest.mark.parametrize(
    ("url", "said", "remedy"),
    [
        ("gs://bucket/studies", "gcsfs is needed for gs storage", "pip install gcsfs"),
        ("nonsense://bucket", "Protocol not known", "Check that the bucket"),
        ("http://127.0.0.1:9/", "could not be written", "Check that the bucket"),
    ],
)
def test_storage_that_cannot_be_used_is_one_error(url: str, said: str, remedy: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        remote.probe(url)
    assert remedy in (caught.value.remedy or "")


def test_records_keep_what_the_worker_saw_and_forget_before_they_delete(
    records: Records, store: str, folder: Path, tmp_path: Path
) -> None:
    study = opened(records, name="far", store_url=store, output_dir=str(tmp_path / "far"))
    addresses = []
    for number, loss in enumerate((1.5, 1.2)):
        study.ask(now=1.0)
        start(study, number, now=2.0)
        addresses.append(checkpoint_url(trial_url(store, number), 1, 10))
        remote.upload(folder, addresses[-1])
        report = replace(evaluation(number, 1, 1, loss, checkpoint=addresses[-1]), contents=CONTENTS)
        study.record(report, now=3.0)
    kept = records.read_study("far").checkpoints()
    assert [(item.path, item.num_bytes, item.sha256, item.has_resume_state) for item in kept] == [
        (address, 7, "0" * 64, True) for address in addresses
    ]
    stray = checkpoint_url(trial_url(store, 9), 1, 10)
    remote.upload(folder, stray)
    study.tidy_checkpoints(tmp_path / "far", keep_best=1)
    remote.settle()
    assert not remote.exists(stray)
    assert [remote.exists(address) for address in addresses] == [True, True]  # both run
    study.release(now=4.0)
    records.delete_study("far", now=5.0)
    assert [remote.exists(address) for address in addresses] == [False, False]
