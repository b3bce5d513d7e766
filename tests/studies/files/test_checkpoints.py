"""A study's folder: names, what stays, and that what stays is whole."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.studies.files import checkpoints
from autosft.studies.files.checkpoints import (
    MANIFEST,
    checkpoint_dir,
    seal,
    slug,
    to_remove,
    trial_dir,
    verify,
)
from autosft.studies.store.records import CheckpointRecord, Records
from autosft.studies.trial import FailureKind, TrialRecord, TrialState
from tests.studies.search.test_sampling import trial as made_trial
from tests.studies.study_examples import end, evaluation, opened, start

# Names


@given(st.text(max_size=300) | st.from_regex(r"[A-Za-z0-9._ -]{1,90}", fullmatch=True))
def test_a_slug_is_a_safe_file_name(name: str) -> None:
    safe = slug(name)
    assert 0 < len(safe) <= 73
    assert safe.isascii()
    assert safe == safe.lower()
    assert not set(safe) & set('/\\:*?"<>|\n\0 ')
    assert safe.strip(".") == safe
    assert slug(safe) == safe


@given(st.text(max_size=100), st.text(max_size=100))
def test_different_studies_never_share_a_folder(one: str, other: str) -> None:
    assert (slug(one) == slug(other)) == (one == other) or one == slug(other) or other == slug(one)


SLUGS = {
    "my-study": "my-study",
    "../../etc": "etc-",
    "My Study": "my-study-",
    "con": "con-",
    "🦙": "study-",
    "x" * 300: "x" * 64 + "-",
}


@pytest.mark.parametrize("name", SLUGS)
def test_slugs_can_be_recognised(name: str) -> None:
    assert slug(name).startswith(SLUGS[name])
    assert (slug(name) == SLUGS[name]) == (name == "my-study")


# What stays


def checkpoint(trial: int, step: int, value: float | None, *, resume: bool = True) -> CheckpointRecord:
    return CheckpointRecord(
        trial=trial,
        attempt=1,
        step=step,
        evaluation=None if value is None else step,
        value=value,
        path=f"{trial}/{step}",
        num_bytes=1,
        sha256="",
        has_resume_state=resume,
        created_at=0.0,
    )


def trials(*states: TrialState) -> list[TrialRecord]:
    parameters = {"learning_rate": 1e-3, "effective_batch_size": 8}
    return [made_trial(number, parameters, 1.0, state) for number, state in enumerate(states)]


DONE, RUNS, BROKEN = TrialState.COMPLETED, TrialState.RUNNING, TrialState.FAILED
CASES = {
    "the best of all trials": (
        [DONE, DONE],
        [checkpoint(0, 1, 3.0), checkpoint(0, 2, 1.0), checkpoint(1, 1, 2.0)],
        2,
        ["0/1"],
    ),
    "the other order": (
        [DONE, DONE],
        [checkpoint(1, 1, 2.0), checkpoint(0, 2, 1.0), checkpoint(0, 1, 3.0)],
        2,
        ["0/1"],
    ),
    "ties go to the earlier": (
        [DONE, DONE],
        [checkpoint(1, 1, 1.0), checkpoint(0, 2, 1.0), checkpoint(0, 1, 1.0)],
        1,
        ["1/1", "0/2"],
    ),
    "the last of a trial that runs": (
        [DONE, RUNS],
        [checkpoint(0, 1, 1.0), checkpoint(1, 1, 2.0), checkpoint(1, 2, 3.0)],
        1,
        ["1/1"],
    ),
    "a trial that runs does not drive out the best of those that are over": (
        [DONE, RUNS],
        [checkpoint(0, 1, 2.0), checkpoint(1, 1, 1.0), checkpoint(1, 2, 3.0)],
        1,
        [],
    ),
    "one to resume from before a later one without": (
        [RUNS],
        [checkpoint(0, 1, 5.0), checkpoint(0, 2, 5.0, resume=False)],
        0,
        ["0/2"],
    ),
    "one that a shutdown left, without a value": (
        [TrialState.WAITING],
        [checkpoint(0, 1, 1.0), checkpoint(0, 2, None)],
        0,
        ["0/1"],
    ),
    "nothing of broken trials": ([BROKEN, DONE], [checkpoint(0, 1, 1.0), checkpoint(1, 1, 2.0)], 1, ["0/1"]),
    "nothing of trials that do not fit": (
        [TrialState.INFEASIBLE, DONE],
        [checkpoint(0, 1, 1.0), checkpoint(1, 1, 2.0)],
        2,
        ["0/1"],
    ),
    "NaN is never among the best": ([DONE], [checkpoint(0, 1, math.nan), checkpoint(0, 2, 9.0)], 1, ["0/1"]),
    "no more than there are": ([DONE], [checkpoint(0, 1, 1.0)], 5, []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_removed(case: str) -> None:
    states, found, keep_best, removed = CASES[case]
    doomed = to_remove(found, trials(*states), keep_best=keep_best, maximize=False)
    assert [trial.path for trial in doomed] == removed


def test_larger_is_better_where_it_is() -> None:
    found = [checkpoint(0, 1, 1.0), checkpoint(0, 2, 2.0)]
    assert [item.path for item in to_remove(found, trials(DONE), keep_best=1, maximize=True)] == ["0/1"]


def test_nothing_of_a_trial_that_diverged() -> None:
    diverged = dataclasses.replace(trials(DONE)[0], value=math.inf)
    found = [checkpoint(0, 1, 1.0)]
    assert to_remove(found, [diverged], keep_best=1, maximize=False) == tuple(found)


# Acting


def write(folder: Path, *, resume: bool = True) -> Path:
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "nested" / "config.json").write_text("{}")
    if resume:
        (folder / "optimizer.pt").write_bytes(b"moments")
    return folder


def test_an_installed_checkpoint_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "trials" / "0000" / "checkpoints" / "step-000010"
    for attempt in range(2):  # the second replaces the first
        checkpoints.install(write(tmp_path / f"staging-{attempt}"), final)
    checkpoints.verify(final)
    contents = checkpoints.inspect(final)
    assert contents.has_resume_state
    assert len(contents.sha256) == 64
    assert contents.num_bytes == sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def flip(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[100] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


DAMAGE = {
    "a flipped bit": (flip, "sha256 differs"),
    "a missing file": (lambda folder: (folder / "nested" / "config.json").unlink(), "is missing"),
    "cut short": (lambda folder: (folder / "optimizer.pt").write_bytes(b"mom"), "sha256 differs"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "a broken manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "is broken"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused(case: str, tmp_path: Path) -> None:
    damage, said = DAMAGE[case]
    final = tmp_path / "step"
    checkpoints.install(write(tmp_path / "staging"), final)
    damage(final)
    with pytest.raises(UserError, match=said):
        checkpoints.verify(final)


def test_a_folder_of_another_machine_is_assumed_to_be_resumable(tmp_path: Path) -> None:
    contents = checkpoints.inspect(tmp_path / "elsewhere")
    assert (contents.has_resume_state, contents.num_bytes, contents.sha256) == (True, 0, "")
    assert not checkpoints.inspect(write(tmp_path / "here", resume=False)).has_resume_state


def test_a_study_keeps_its_best_and_what_it_needs_to_resume(records: Records, tmp_path: Path) -> None:
    study = opened(records)
    folders: dict[tuple[int, int], Path] = {}
    for number in range(3):
        study.ask(now=0.0)
        start(study, number)
        for step in (10, 20):
            folder = checkpoint_dir(trial_dir(tmp_path, number), step)
            checkpoints.install(write(tmp_path / "staging"), folder)
            folders[number, step] = folder
            loss = 1.0 + number + step / 100
            study.record(evaluation(number, 1, step // 10, loss, checkpoint=str(folder)), now=0.0)
        if number < 2:
            study.end_attempt(end(number, 1), TrialState.COMPLETED, now=0.0)
    stray = checkpoint_dir(trial_dir(tmp_path, 0), 30)
    unreported = checkpoint_dir(trial_dir(tmp_path, 2), 30)
    for folder in (stray, unreported, trial_dir(tmp_path, 1) / "staging-1"):
        write(folder)
    evaluations = trial_dir(tmp_path, 0) / "evaluations"
    evaluations.mkdir()

    removed = study.tidy_checkpoints(tmp_path, keep_best=1)
    left = {folders[0, 10], folders[2, 20]}
    assert {key for key, folder in folders.items() if folder.exists()} == {(0, 10), (2, 20)}
    assert set(removed) == {str(folder) for folder in folders.values() if folder not in left}
    assert {item.path for item in study.checkpoints()} == {str(folder) for folder in left}
    assert records.read_study("study").checkpoints() == study.checkpoints()
    assert not stray.exists()  # of a killed process
    assert not (trial_dir(tmp_path, 1) / "staging-1").exists()
    assert unreported.exists()  # its trial runs: the report may be on the way
    assert evaluations.exists()

    study.end_attempt(end(2, 1, failure=FailureKind.ERROR), TrialState.FAILED, now=1.0)
    assert study.tidy_checkpoints(tmp_path, keep_best=1) == (str(folders[2, 20]),)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such modes")
@pytest.mark.parametrize(("folder_mode", "expected"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_whoever_may_read_the_folder_may_read_the_weights(
    tmp_path: Path, folder_mode: int, expected: int
) -> None:
    """safetensors writes for the owner alone."""
    staged = write(tmp_path / "staging")
    (staged / "model.safetensors").chmod(0o600)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(folder_mode)
    checkpoints.install(staged, tmp_path / "shared" / "step")
    weights = tmp_path / "shared" / "step" / "model.safetensors"
    assert stat.S_IMODE(weights.stat().st_mode) == expected


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    checkpoints.install(write(tmp_path / "staging"), tmp_path / "step")
    files = json.loads((tmp_path / "step" / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "nested/config.json", "optimizer.pt"}


@pytest.mark.parametrize("name", ["x" * 300, "../outside", "{folder}/outside", "gone"])
def test_a_manifest_that_names_no_file_of_its_folder_is_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_bytes(b"x")
    seal(tmp_path / "checkpoint")
    manifest = tmp_path / "checkpoint" / MANIFEST
    files = json.loads(manifest.read_text())
    files["files"] = {name.format(folder=tmp_path): files["files"]["weights"]}
    manifest.write_text(json.dumps(files))
    with pytest.raises(UserError, match="is missing"):
        verify(tmp_path / "checkpoint")
