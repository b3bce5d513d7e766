"""A study with results, in the records of a service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosft.studies.export import ExportedConfig, exported
from autosft.studies.store.records import Records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrialState
from tests.studies.study_examples import end, evaluation, opened, start


def example_study(records: Records, folder: Path, name: str = "study", **changes: Any) -> StudyRecords:
    """Run a study with a completed trial and one that runs."""
    output = folder / name
    (output / "trials" / "0000").mkdir(parents=True)
    (output / "best.yaml").write_text("format: 1\n")
    log = output / "trials" / "0000" / "attempt-1.log"
    log.write_text("step 1\nstep 2\n")
    study = opened(records, name=name, output_dir=str(output), num_trials=3, **changes)
    for number in range(2):
        study.ask(now=0.0)
        start(study, number)
        for at, loss in enumerate((1.3, 1.1 + number, 1.2), start=1):
            study.record(evaluation(number, 1, at, loss), now=1.0)
    study.end_attempt(end(0, 1, log_path=str(log)), TrialState.COMPLETED, now=2.0)
    return study


def example_config(folder: Path, **changes: Any) -> ExportedConfig:
    """Return the best configuration of such a study of a model and data."""
    from contextlib import closing

    from autosft.studies.store.records import open_records

    folder.mkdir()
    with closing(open_records(f"sqlite:///{folder}/config.db")) as records:
        study = example_study(records, folder, **changes)
        return exported(study.spec, study.trial(0))
