"""What names a model means the same to every command that takes one: all kinds, by all commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from autosft.cli import main
from autosft.commands import chat, export
from autosft.commands import evaluate as command
from autosft.profiles.errors import UserError
from autosft.scheduler.finish.export import Exported
from autosft.scheduler.finish.given_models import GivenModel, Kind, base_named_by, resolve_model
from autosft.scheduler.train.run_state import EVALUATIONS, RUN_NOTE
from autosft.studies.export import exported, write_config
from autosft.studies.files.checkpoints import checkpoint_dir, install, study_dir, trial_dir
from autosft.studies.store.records import Driver, open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrialState
from autosft.studies.wire import to_plain
from tests.studies import study_examples

Place = tuple[Path, list[StudyRecords]]


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def adapter_in(folder: Path, base: str = "/models/base") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def checkpoint_in(folder: Path, staged: Path) -> Path:
    install(adapter_in(staged), folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A folder with one of each kind, and the study of a database."""
    monkeypatch.chdir(tmp_path)
    output = study_dir(tmp_path / "out", "demo")
    best = checkpoint_in(checkpoint_dir(trial_dir(output, 1), 20), tmp_path / "staged-1")
    with closing(open_records(f"sqlite:///{tmp_path}/studies.db")) as records:
        spec = study_examples.spec("demo", model="models/tiny", output_dir=str(output))
        study = records.open_study(spec, now=1.0)
        study.take_over(Driver.current(), now=1.0)
        for number, value in enumerate((2.5, 1.5)):
            study.ask(now=2.0)
            study_examples.start(study, number)
            path = str(best) if number else str(tmp_path / "gone")
            study.record(study_examples.evaluation(number, 1, 2, value, checkpoint=path), now=3.0)
            study.end_attempt(study_examples.end(number, 1), TrialState.COMPLETED, now=4.0)
        study.release(now=5.0)
        config = exported(study.spec, study.trials()[1])
        write_config(output / "best.yaml", config)
        (tmp_path / "elsewhere").mkdir()
        write_config(tmp_path / "elsewhere" / "best.yaml", config)
        write_config(model_in(tmp_path / "exported") / "best.yaml", config)
        model_in(tmp_path / "model")
        for step in (10, 20):
            model_in(checkpoint_dir(tmp_path / "several", step))
        adapter_in(tmp_path / "adapter")
        (tmp_path / "model.bin").write_bytes(b"GGUF....")
        run = tmp_path / "run"
        for step, loss in ((10, 1.5), (20, 1.25), (30, 1.4)):
            folder = checkpoint_in(checkpoint_dir(run, step), tmp_path / f"staged-run-{step}")
            made = study_examples.evaluation(0, 1, step // 10, loss, checkpoint=str(folder))
            with (run / EVALUATIONS).open("a") as file:
                file.write(json.dumps(to_plain(made)) + "\n")
        (run / RUN_NOTE).write_text("{}")
        yield tmp_path, [study]


WRITTEN = Exported(folder=Path("out.x"), command="run it")
BEST = "out/demo/trials/0001/checkpoints/step-000020"
CASES = {
    "a study": ("demo", Kind.STUDY, BEST),
    "a study's folder": ("out/demo", Kind.RUN, BEST),
    "its best.yaml": ("out/demo/best.yaml", Kind.CONFIG, BEST),
    "a best.yaml elsewhere, by the database": ("elsewhere/best.yaml", Kind.CONFIG, BEST),
    "a best.yaml beside its weights": ("exported/best.yaml", Kind.CONFIG, "exported"),
    "a checkpoint": (BEST, Kind.CHECKPOINT, BEST),
    "a trial's folder with one checkpoint": ("out/demo/trials/0001", Kind.CHECKPOINT, BEST),
    "a run of autosft train, its best and not its last": ("run", Kind.RUN, "run/checkpoints/step-000020"),
    "an adapter": ("adapter", Kind.ADAPTER, "adapter"),
    "a model": ("model", Kind.MODEL, "model"),
    "an exported model": ("exported", Kind.MODEL, "exported"),
    "a GGUF file, whatever it is called": ("model.bin", Kind.GGUF, "model.bin"),
    "a hub id": ("someone/model", Kind.HUB, None),
    "a hub id without an owner": ("gpt2", Kind.HUB, None),
    "a URL": ("s3://bucket/step-000010/", Kind.URL, None),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_is_recognised_and_found(case: str, place: Place) -> None:
    folder, studies = place
    given, kind, where = CASES[case]
    found = resolve_model(given, studies)
    assert found.kind is kind
    assert found.source == (given.rstrip("/") if where is None else str(folder / where))
    assert (found.study is not None) == (where == BEST)
    assert found.trial == (1 if where == BEST or "exported" in given else None)


@pytest.mark.parametrize("case", [case for case, (_, _, where) in CASES.items() if where is not None])
def test_every_command_takes_every_kind(case: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = place
    given, _, where = CASES[case]
    storage = f"sqlite:///{folder}/studies.db"
    compare = "best" if given == "demo" else None
    models, *_ = chat.resolve(given, compare, storage, wants_data=False)
    checked: list[GivenModel] = []
    monkeypatch.setattr(command, "check_all", lambda models, _: checked.extend(models) or [])
    monkeypatch.setattr(command, "score_all", lambda *_, **__: [])
    assert main(["evaluate", given, "--metric", "eval_loss", "--storage", storage]) == 0
    exported_from: list[str] = []
    monkeypatch.setattr(
        export, "write_folder", lambda path, *_, **__: exported_from.append(str(path)) or WRITTEN
    )
    monkeypatch.setattr(
        export, "write", lambda study, trial, *_: exported_from.append(trial.best_checkpoint) or WRITTEN
    )
    assert main(["export", given, "--format", "vllm", "--output", "out.x", "--storage", storage]) == 0
    assert exported_from == [str(folder / str(where))]
    assert [model.source for model in models] == [str(folder / str(where))]
    assert [model.source for model in checked] == [str(folder / str(where))]


BASES = {"demo": "models/tiny", "exported": "models/tiny", "adapter": "/models/base", "model": None}


@pytest.mark.parametrize("given", BASES)
def test_what_a_model_was_tuned_from(given: str, place: Place) -> None:
    assert base_named_by(resolve_model(given, place[1])) == BASES[given]


WRONG = {
    "a path of nothing": ("./nowhere/model", "no such file or folder, and no study"),
    "a folder without a model": ("elsewhere/..", "is not a model folder"),
    "a folder of several checkpoints": ("several", "holds 2 checkpoints of a run"),
    "a file of a model": ("model/config.json", "It lies in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_none_is_refused_with_what_would_do(case: str, place: Place) -> None:
    given, said = WRONG[case]
    with pytest.raises(UserError, match=said) as caught:
        resolve_model(given, place[1])
    assert caught.value.remedy


def test_a_best_yaml_of_which_nothing_is_here_says_how_to_train_it(place: Place) -> None:
    assert place
    with pytest.raises(UserError, match="no checkpoint is on this machine") as caught:
        resolve_model("elsewhere/best.yaml", [])
    assert "autosft train elsewhere/best.yaml --output" in str(caught.value.remedy)
