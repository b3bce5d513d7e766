"""Renaming and deleting: a study's rows, in our tables and in Optuna's, and its files; nothing else's."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from autosft.profiles.errors import UserError
from autosft.studies.files.checkpoints import checkpoint_dir, slug, study_dir, trial_dir
from autosft.studies.report.comparison import compare_studies, trials_as_rows
from autosft.studies.store.records import Records, StudyInUseError
from autosft.studies.trial import TrialState
from tests.studies.study_examples import PLAN, end, evaluation, opened, start

pytestmark = pytest.mark.slow

STRANGE_NAMES = ["../../etc", "it's", 'a "b" %s', "emoji 🦙", "x" * 200, "con"]


def make_study(records: Records, output: Path, name: str, *, losses: tuple[float, ...] = (1.5,)) -> Path:
    """A finished study with a checkpoint a trial; return its folder."""
    folder = study_dir(output, name)
    study = opened(records, name=name, output_dir=str(folder))
    for number, loss in enumerate(losses):
        study.ask(now=1.0)
        start(study, number, now=2.0)
        checkpoint = checkpoint_dir(trial_dir(folder, number), 10)
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        study.record(evaluation(number, 1, 1, loss, checkpoint=str(checkpoint)), now=3.0)
        study.add_memory_observation(
            trial=number, attempt=1, plan=PLAN, allocated_bytes=5, reserved_bytes=None, now=3.0
        )
        study.end_attempt(end(number, 1), TrialState.COMPLETED, now=4.0 + number)
    (folder / "best.yaml").write_text("format: 1")
    study.release(now=9.0)
    return folder


def rows_of(url: str) -> dict[str, int]:
    """Count the rows of every table, ours and Optuna's."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        counts = {
            table: int(connection.scalar(sa.text(f'SELECT count(*) FROM "{table}"')) or 0) for table in tables
        }
    engine.dispose()
    return counts


@pytest.mark.parametrize("name", ["plain", *STRANGE_NAMES])
def test_deleting_a_study_removes_its_own_rows_and_files_only(
    name: str, records: Records, url: str, tmp_path: Path
) -> None:
    other = make_study(records, tmp_path / "out", "other")
    before = rows_of(url)
    folder = make_study(records, tmp_path / "out", name)
    assert rows_of(url)["autosft_checkpoints"] == 2
    removed = records.delete_study(name, now=10.0)
    kept_on_purpose = {"autosft_memory_observations": 2}
    assert rows_of(url) == before | kept_on_purpose
    assert not folder.exists()
    assert removed.num_bytes == len(b"weights") + len(b"format: 1")
    assert sorted(path.name for path in other.rglob("*") if path.is_file()) == [
        "best.yaml",
        "model.safetensors",
    ]
    assert [study.spec.name for study in records.studies()] == ["other"]


def test_a_new_study_of_a_deleted_ones_name_starts_afresh_with_what_was_learned(
    records: Records, tmp_path: Path
) -> None:
    for _ in range(2):
        make_study(records, tmp_path, "again")
        records.delete_study("again", now=10.0)
    assert len(records.memory_observations()) == 2


def test_what_is_not_ours_in_a_study_folder_stays(records: Records, tmp_path: Path) -> None:
    folder = make_study(records, tmp_path / "out", "study")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (folder / "my-notes.txt").write_text("x")
    (folder / "artifacts").symlink_to(elsewhere)
    removed = records.delete_study("study", now=10.0)
    assert removed.left == (str(folder / "my-notes.txt"),)
    assert [path.name for path in folder.iterdir()] == ["my-notes.txt"]
    assert (elsewhere / "precious").exists()


def test_a_folder_of_another_name_is_never_touched(records: Records, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "trials").mkdir(parents=True)
    opened(records, name="study", output_dir=str(home)).release(now=1.0)
    records.delete_study("study", now=10.0)
    assert (home / "trials").is_dir()


def test_a_running_study_is_neither_deleted_nor_renamed(records: Records, tmp_path: Path) -> None:
    study = opened(records, name="runs", output_dir=str(tmp_path / "runs"))
    for change in (
        lambda: records.delete_study("runs", now=1.0),
        lambda: records.rename_study("runs", "other", now=1.0),
    ):
        with pytest.raises(StudyInUseError, match="process 1 on host-1"):
            change()
    study.ask(now=2.0)
    assert len(records.read_study("runs").trials()) == 1


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_a_renamed_study_continues_under_its_new_name(name: str, records: Records, tmp_path: Path) -> None:
    old = make_study(records, tmp_path, "old")
    folder = records.rename_study("old", name, now=10.0)
    assert folder == tmp_path / slug(name)
    assert not old.exists()
    with pytest.raises(UserError, match="no study named 'old'"):
        records.read_study("old")
    study = opened(records, name=name, now=100.0, number=2, output_dir=str(folder))
    [trial] = study.trials()
    assert trial.best_checkpoint is not None
    assert (Path(trial.best_checkpoint) / "model.safetensors").is_file()
    assert [checkpoint.path for checkpoint in study.checkpoints()] == [trial.best_checkpoint]
    assert study.progress(0)[0].checkpoint == trial.best_checkpoint
    assert study.ask(now=101.0).number == 1
    import optuna

    storage = records._optuna()
    [theirs] = optuna.study.get_all_study_summaries(storage)
    assert theirs.study_name == name
    shown = optuna.load_study(study_name=name, storage=storage).trials[0].user_attrs
    assert shown["best checkpoint"] == trial.best_checkpoint


TAKEN = {
    "by a study": ("other", "already a study named 'other'"),
    "by nobody, but empty": (" ", "1 to 200 characters"),
    "by a folder": ("folder", "already exists"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_name_that_cannot_be_taken_is_refused_and_nothing_changes(
    case: str, records: Records, tmp_path: Path
) -> None:
    name, said = TAKEN[case]
    folder = make_study(records, tmp_path, "old")
    make_study(records, tmp_path, "other")
    (tmp_path / "folder").mkdir()
    before = records.read_study("old").trials()
    with pytest.raises(UserError, match=said):
        records.rename_study("old", name, now=10.0)
    assert records.read_study("old").trials() == before
    assert folder.is_dir()


def test_a_folder_that_cannot_be_moved_rolls_the_rows_back(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study(records, tmp_path, "old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        records.rename_study("old", "new", now=10.0)
    assert [study.spec.name for study in records.studies()] == ["old"]


# Side by side


def test_studies_are_compared_by_their_best_trials(records: Records, tmp_path: Path) -> None:
    for name, losses in {"first": (2.0, 1.5), "second": (1.7,)}.items():
        make_study(records, tmp_path, name, losses=losses)
    first, second = compare_studies([records.read_study(name) for name in ("first", "second")])
    assert first.best is not None
    assert (first.best.number, first.best.value, first.num_finished) == (1, 1.5, 2)
    assert first.training_s == 5.0
    assert second.gain is None
    assert "losses per example are gone" in second.why_no_gain


def test_a_table_of_trials_has_the_same_columns_in_each_row(records: Records, tmp_path: Path) -> None:
    make_study(records, tmp_path, "study", losses=(2.0, 1.5))
    study = records.read_study("study")
    table = trials_as_rows(study.spec, study.trials())
    assert [row["eval_loss"] for row in table] == [2.0, 1.5]
    assert [row["learning_rate"] for row in table] == [
        dict(trial.parameters)["learning_rate"] for trial in study.trials()
    ]
    assert table[0].keys() == table[1].keys()
