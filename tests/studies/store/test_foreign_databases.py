"""Databases that are somebody else's, that go away while a study runs, and what their rows may name."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.studies.files.checkpoints import may_be_removed, seal, trial_dir
from autosft.studies.files.study_folder import is_our_checkpoint, remove_files
from autosft.studies.store import database
from autosft.studies.store.records import default_storage_url, open_records
from tests.studies.study_examples import driver, opened, spec


def tables_of(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return sorted(
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
        )


@pytest.mark.parametrize(
    "others", [("alembic_version", "orders"), ("orders",), ("studies", "alembic_version")]
)
def test_another_programs_database_gets_no_tables_of_ours(tmp_path: Path, others: tuple[str, ...]) -> None:
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        for name in others:
            connection.execute(f"CREATE TABLE {name} (version_num TEXT)")
    with pytest.raises(UserError, match="belongs to another program"):
        open_records(f"sqlite:///{path}")
    assert tables_of(path) == sorted(others)


@pytest.mark.parametrize("what", ["deleted", "replaced", "moved"])
def test_a_database_that_goes_away_while_a_study_runs_ends_it_in_words(tmp_path: Path, what: str) -> None:
    """The open file would take every write, and nobody would ever see them."""
    path = tmp_path / "studies.db"
    with closing(open_records(f"sqlite:///{path}")) as records:
        study = opened(records)
        study.ask(now=0.0)
        if what == "deleted":
            path.unlink()
        elif what == "moved":
            path.rename(tmp_path / "moved.db")
        else:
            shutil.copy(path, tmp_path / "copy.db")
            (tmp_path / "copy.db").replace(path)
        for write in (lambda: study.heartbeat(now=30.0), lambda: study.ask(now=30.0)):
            with pytest.raises(
                StudyFailedError, match="replaced" if what == "replaced" else "deleted or moved"
            ):
                write()


@pytest.mark.parametrize("name", ["a?b", "100%", "a%41b", "a#b", "a b", "ä&ö", "c=d;e"])
def test_any_folder_can_hold_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / name
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    with closing(open_records(default_storage_url())) as records:
        records.open_study(spec(), now=0.0)
    assert (folder / "autosft" / "studies.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_database_that_another_process_keeps_locked_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "studies.db"
    monkeypatch.setattr(database, "QUIET_S", 0.05)
    monkeypatch.setattr(database, "RETRY_S", 0.01)
    with closing(open_records(f"sqlite:///{path}")) as records, closing(sqlite3.connect(path)) as other:
        study = opened(records)
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(database.time, "sleep", lambda _: other.rollback())
        with caplog.at_level(logging.WARNING):
            study.ask(now=0.0)
        assert "Waiting up to 90 s for the study database" in caplog.text
        assert "locked" in caplog.text


def test_a_lock_is_said_before_optunas_tables_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Optuna tries again by itself, without a word, five times as long as SQLite waits."""
    path = tmp_path / "studies.db"
    monkeypatch.setattr(database, "QUIET_S", 0.05)
    monkeypatch.setattr(database, "RETRY_S", 0.01)
    with closing(open_records(f"sqlite:///{path}")) as records, closing(sqlite3.connect(path)) as other:
        study = opened(records)
        study.project_later()
        study.ask(now=0.0)
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(database.time, "sleep", lambda _: other.rollback())
        with caplog.at_level(logging.WARNING):
            study.project(now=0.0, at_once=True)
        assert "Waiting up to 90 s for the study database" in caplog.text
        assert "out of date" not in caplog.text


def test_a_disk_that_turned_read_only_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself speaks of an I/O error."""

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    url = database.parse_url(f"sqlite:///{tmp_path / 'studies.db'}")
    with pytest.raises(UserError, match=r"disk I/O error \(Read-only file system\)"):  # noqa: SIM117
        with database.readable_errors(url):
            raise sqlite3.OperationalError("disk I/O error")


# --- what rows name -----------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    seal(folder)
    return folder


def test_deleting_a_study_removes_what_is_ours_and_nothing_else_that_a_row_names(tmp_path: Path) -> None:
    mine = tmp_path / "runs" / "study"
    inside = checkpoint(trial_dir(mine, 0) / "checkpoints" / "step-000010")
    earlier = checkpoint(tmp_path / "old" / "study" / "trials" / "0001" / "checkpoints" / "step-000010")
    theirs = {
        "a folder": tmp_path / "thesis",
        "a model": tmp_path / "study" / "trials" / "0001" / "checkpoints" / "final",
        "another study's": tmp_path / "old" / "other" / "trials" / "0001" / "checkpoints" / "step-000010",
        "no manifest": tmp_path / "old" / "study" / "trials" / "0002" / "checkpoints" / "step-000010",
        "beside": tmp_path / "old" / "study" / "trials" / "notes" / "checkpoints" / "step-000010",
    }
    for name, folder in theirs.items():
        checkpoint(folder)
        if name == "no manifest":
            (folder / "manifest.json").unlink()
    linked = tmp_path / "linked" / "study"
    linked.parent.mkdir()
    linked.symlink_to(tmp_path / "old" / "study")
    through_a_link = linked / "trials" / "0001" / "checkpoints" / "step-000010"
    assert not is_our_checkpoint(through_a_link, "study")
    up = tmp_path / "x" / ".." / "old" / "study" / "trials" / "0001" / "checkpoints" / "step-000010"
    assert not is_our_checkpoint(up, "study")
    (mine / "trials" / "notes").mkdir()
    (mine / "trials" / "notes" / "why.txt").write_text("mine")
    removed = remove_files(
        mine, [str(path) for path in (inside, earlier, *theirs.values(), "/nowhere")], study="study"
    )
    assert not inside.exists()
    assert not earlier.exists()
    assert all(folder.is_dir() for folder in theirs.values())
    assert removed.left == tuple(sorted([*map(str, theirs.values()), str(mine / "trials" / "notes")]))


def test_tidying_keeps_to_the_studys_folder(tmp_path: Path) -> None:
    study = tmp_path / "study"
    inside = checkpoint(trial_dir(study, 0) / "checkpoints" / "step-000010")
    assert may_be_removed(inside, study)
    for other in (
        tmp_path,
        study,
        study / "trials",
        tmp_path / "thesis",
        Path("/"),
        study / ".." / "a" / "b" / "c" / "d",
    ):
        assert not may_be_removed(other, study), other
    link = inside.parent / "step-000020"
    link.symlink_to(tmp_path)
    assert not may_be_removed(link, study)


def test_a_row_that_names_a_folder_of_the_users_removes_nothing(tmp_path: Path) -> None:
    """Through the public way: somebody else's database, and a run over it."""
    path = tmp_path / "studies.db"
    victim = tmp_path / "thesis"
    victim.mkdir()
    (victim / "thesis.tex").write_text("of years")
    with closing(open_records(f"sqlite:///{path}")) as records:
        study = opened(records, output_dir=str(tmp_path / "runs" / "study"))
        study.ask(now=0.0)
        study.release(now=0.0)
    with closing(sqlite3.connect(path)) as connection, connection:
        [trial_id] = connection.execute("SELECT id FROM autosft_trials").fetchone()
        columns = {
            "trial_id": trial_id,
            "attempt": 1,
            "step": 1,
            "path": str(victim),
            "num_bytes": 7,
            "sha256": "",
            "has_resume_state": 0,
            "created_at": 0.0,
            "value": 9.0,
        }
        names = ", ".join(columns)
        marks = ", ".join(f":{name}" for name in columns)
        connection.execute(f"INSERT INTO autosft_checkpoints ({names}) VALUES ({marks})", columns)
    with closing(open_records(f"sqlite:///{path}")) as records:
        study = records.open_study(spec(output_dir=str(tmp_path / "runs" / "study")), now=1.0)
        study.take_over(driver(2), now=1.0)
        study.tidy_checkpoints(tmp_path / "runs" / "study", keep_best=0)
        study.release(now=2.0)
        records.delete_study("study", now=3.0)
    assert (victim / "thesis.tex").read_text() == "of years"


def test_what_is_in_a_row_that_cannot_be_read_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    with closing(open_records(f"sqlite:///{path}")) as records:
        opened(records).release(now=0.0)
    for broken in ("", "[]", "{", json.dumps({"name": 3})):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE autosft_studies SET spec = ?", (broken,))
        with closing(open_records(f"sqlite:///{path}")) as records, pytest.raises(UserError, match="study"):
            records.read_study("study")
