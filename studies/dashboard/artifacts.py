"""A trial's artifacts in Optuna's dashboard, generated from our records on request.

Nothing is copied or kept up to date: a trial's artifacts are registered when the trial is created, and those
of a running trial show what there is so far.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import yaml

from autosft.studies.dashboard.charts import line_chart, memory_chart
from autosft.studies.export import exported
from autosft.studies.results.summary import peak_bytes
from autosft.studies.store.artifact_ids import _PREFIX, KINDS
from autosft.studies.trial import TrialRecord
from autosft.studies.wire import to_plain

if TYPE_CHECKING:
    from autosft.studies.store.records import Records
    from autosft.studies.store.study_records import StudyRecords

#: Number of bytes shown from the end of a log.
MAX_LOG_BYTES = 1 << 20


class StudyArtifacts:
    """An Optuna artifact store over our records; what users upload is stored in a folder."""

    def __init__(self, records: Records, uploads: Path) -> None:
        self._records = records
        self._uploads = uploads

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from optuna.artifacts import FileSystemArtifactStore
        from optuna.artifacts.exceptions import ArtifactNotFound

        if not artifact_id.startswith(f"{_PREFIX}-"):
            return FileSystemArtifactStore(self._uploads).open_reader(artifact_id)
        study_id, trial, kind = (int(part, 16) for part in artifact_id.split("-")[1:])
        study = self._records.study_by_id(study_id)
        if study is None or trial >= len(study.trials()):
            raise ArtifactNotFound("its study or trial has been deleted")
        return io.BytesIO(content(study, study.trial(trial), list(KINDS)[kind]).encode())

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        from optuna.artifacts import FileSystemArtifactStore

        self._uploads.mkdir(parents=True, exist_ok=True)
        FileSystemArtifactStore(self._uploads).write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        from optuna.artifacts import FileSystemArtifactStore

        if not artifact_id.startswith(f"{_PREFIX}-"):
            FileSystemArtifactStore(self._uploads).remove(artifact_id)


def content(study: StudyRecords, trial: TrialRecord, kind: str) -> str:
    """Return an artifact of a trial by its name in `KINDS`."""
    match kind:
        case "learning-curve.svg":
            return learning_curve(study, trial)
        case "memory.svg":
            return memory(study, trial)
        case "configuration.yaml":
            return configuration(study, trial)
    return log(study, trial)


def learning_curve(study: StudyRecords, trial: TrialRecord) -> str:
    metric = study.spec.metric
    evaluations = [(measurement.num_tokens, measurement.metric(metric)) for measurement in trial.measurements]
    training = [(report.num_tokens, report.loss) for report in study.progress(trial.number)]
    lines = [
        (name, [(float(x), y) for x, y in points if y is not None])
        for name, points in ((metric, evaluations), ("training loss", training))
    ]
    return line_chart(lines, x="training tokens", title=f"Trial {trial.number}")


def memory(study: StudyRecords, trial: TrialRecord) -> str:
    if trial.plan is None or trial.plan.measures_itself:
        return line_chart([], x="", title="")
    attempts = [attempt for attempt in study.attempts() if attempt.trial == trial.number]
    return memory_chart(trial.plan.estimate, peak_bytes(attempts, trial))


def configuration(study: StudyRecords, trial: TrialRecord) -> str:
    """Return what `autosft export` writes; before the first evaluation, only the settings."""
    plain = to_plain(trial.settings) if trial.value is None else to_plain(exported(study.spec, trial))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def log(study: StudyRecords, trial: TrialRecord) -> str:
    """Return the logs of a trial's attempts that are on this machine, last attempt first."""
    parts = []
    for attempt in reversed(study.attempts()):
        if attempt.trial != trial.number:
            continue
        head = f"== attempt {attempt.number} on {attempt.device_name}: {attempt.outcome or 'running'}"
        parts.append(f"{head}\n{attempt.message}\n{tail(attempt.log_path)}")
    return "\n".join(parts) or "This trial has not been started.\n"


def tail(path: str | None) -> str:
    if path is None or not Path(path).is_file():
        return "(no log on this machine)\n"
    with Path(path).open("rb") as file:
        file.seek(max(0, Path(path).stat().st_size - MAX_LOG_BYTES))
        return file.read().decode("utf-8", errors="replace")
