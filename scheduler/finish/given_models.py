"""What a user names a model by, for every command that takes one: resolved in one place.

A study, the folder of a study or of `autosft train`, a checkpoint, an adapter's folder, a model's folder, a
GGUF file, a best.yaml, a URL of a checkpoint, or a name of the hub.  A path of something that is there is
taken as that; any other name is a study's, or else the hub's.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.dataset.hub import looks_like_path
from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG
from autosft.profiles.model.gguf import is_gguf
from autosft.profiles.sources import trained_in
from autosft.scheduler.train.run_state import RUN_NOTE, best_kept_checkpoint
from autosft.studies.export import ExportedConfig, read_config
from autosft.studies.files.checkpoints import checkpoint_dir, trial_dir
from autosft.studies.files.remote import is_url
from autosft.studies.results.summary import best_trial
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.values import CheckpointRecord, Direction


class Kind(enum.Enum):
    """What an argument turned out to be."""

    STUDY = "study"  #: by its name: its best checkpoint
    RUN = "run"  #: the folder of a study or of `autosft train`: its best checkpoint
    CHECKPOINT = "checkpoint"  #: a folder that a trial or a run has written
    ADAPTER = "adapter"  #: a folder of peft's
    MODEL = "model"  #: a folder of transformers'
    GGUF = "GGUF file"
    CONFIG = "best.yaml"  #: what was trained by it
    URL = "URL"  #: of a checkpoint
    HUB = "hub id"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenModel:
    """A model that a user has named."""

    given: str  # as typed
    kind: Kind
    source: str  # folder, file, URL or hub id that holds its weights
    study: StudyRecords | None = None  # that it belongs to, if the database knows it
    record: CheckpointRecord | None = None  # of that study
    config: ExportedConfig | None = None  # it was trained by, if that lies beside it

    @property
    def trial(self) -> int | None:
        if self.record is not None:
            return self.record.trial
        return None if self.config is None else self.config.trial


def resolve_model(given: str, studies: Sequence[StudyRecords]) -> GivenModel:
    """Return the model that `given` names; `studies` are those of the database.

    Raises UserError, with what would do, for a path that holds no model, a study or a best.yaml of which no
    checkpoint is here, and a name that is neither.
    """
    if is_url(given):
        return known(GivenModel(given=given, kind=Kind.URL, source=given.rstrip("/")), studies)
    path = Path(given).expanduser()
    if path.is_dir():
        return known(of_folder(given, path.resolve(), studies), studies)
    if path.is_file():
        return known(of_file(given, path.resolve(), studies), studies)
    named = next((study for study in studies if study.spec.name == given), None)
    if named is not None:
        return of_study(given, named, kind=Kind.STUDY)
    if looks_like_path(given):
        raise UserError(
            f"{given}: there is no such file or folder, and no study of this name.",
            remedy="Give a study, a checkpoint, an adapter's or a model's folder, a best.yaml or a hub id.",
        )
    return GivenModel(given=given, kind=Kind.HUB, source=given)


def known(model: GivenModel, studies: Sequence[StudyRecords]) -> GivenModel:
    """Return a model with the study that it belongs to, if the database knows its checkpoint."""
    if model.record is not None:
        return model
    for study in studies:
        for record in study.checkpoints():
            if model.source in (record.path, str(Path(record.path).resolve())):
                return GivenModel(
                    given=model.given,
                    kind=model.kind,
                    source=model.source,
                    study=study,
                    record=record,
                    config=model.config,
                )
    return model


# Folders


def of_folder(given: str, folder: Path, studies: Sequence[StudyRecords]) -> GivenModel:
    """Return the model in a folder, or the best one below it."""
    if holds_model(folder):
        is_checkpoint = folder.parent.name == "checkpoints"
        kind = Kind.ADAPTER if is_adapter(folder) else Kind.MODEL
        config = config_in(folder)
        return GivenModel(
            given=given, kind=Kind.CHECKPOINT if is_checkpoint else kind, source=str(folder), config=config
        )
    if (folder / RUN_NOTE).is_file():
        return of_training_run(given, folder, kind=Kind.RUN)
    if (folder / "best.yaml").is_file():
        return of_config(given, folder / "best.yaml", studies, kind=Kind.RUN)
    found = next((study for study in studies if Path(study.spec.output_dir).resolve() == folder), None)
    if found is not None:
        return of_study(given, found, kind=Kind.RUN)
    if (inner := trained_in(str(folder))) != str(folder):  # a trial that has kept one
        return GivenModel(given=given, kind=Kind.CHECKPOINT, source=inner)
    raise UserError(
        f"{given} is not a model folder: it has no config.json and no {ADAPTER_CONFIG}.",
        remedy="Give a study, a checkpoint, an adapter's or a model's folder, a best.yaml or a hub id.",
    )


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter itself."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def config_in(folder: Path) -> ExportedConfig | None:
    """Return the best.yaml beside exported weights; None without one, or where it is of another format."""
    try:
        return read_config(folder / "best.yaml")
    except UserError:
        return None


def of_training_run(given: str, folder: Path, *, kind: Kind) -> GivenModel:
    """Return the best checkpoint of a folder of `autosft train`."""
    best = best_kept_checkpoint(folder)
    if best is None:
        raise UserError(
            f"{given} is a run of autosft train without a whole checkpoint.",
            remedy="The command that started it resumes it.",
        )
    return GivenModel(given=given, kind=kind, source=str(best))


# Files


def of_file(given: str, path: Path, studies: Sequence[StudyRecords]) -> GivenModel:
    """Return the model that a file is, or that was trained by it."""
    if is_gguf(str(path)):
        return GivenModel(given=given, kind=Kind.GGUF, source=str(path))
    if path.suffix in (".yaml", ".yml"):
        return of_config(given, path, studies, kind=Kind.CONFIG)
    inside = f" It lies in {path.parent}, which is one." if holds_model(path.parent) else ""
    raise UserError(
        f"{given} is a file, and neither a GGUF file nor a best.yaml.{inside}",
        remedy="Give the folder that holds the model.",
    )


def of_config(given: str, path: Path, studies: Sequence[StudyRecords], *, kind: Kind) -> GivenModel:
    """Return what was trained by a best.yaml: beside it, by `autosft train`, or in its study."""
    config = read_config(path)
    beside = path.parent
    if holds_model(beside):
        return GivenModel(given=given, kind=kind, source=str(beside), config=config)
    step = config.expected.step
    if step is not None:
        checkpoint = checkpoint_dir(trial_dir(beside, config.trial), step)
        if holds_model(checkpoint):
            return GivenModel(given=given, kind=kind, source=str(checkpoint), config=config)
    trained = path.with_suffix("")
    if (trained / RUN_NOTE).is_file():
        return of_training_run(given, trained, kind=kind)
    named = next((study for study in studies if study.spec.name == config.study), None)
    record = None if named is None else checkpoint_of(named, config.trial, step)
    if named is None or record is None:
        raise UserError(
            f"{given} is the configuration of study {config.study!r}, trial {config.trial}, of which no "
            "checkpoint is on this machine.",
            remedy=f"Train it: autosft train {given} --output my-model, and give that folder.",
        )
    return GivenModel(given=given, kind=kind, source=record.path, study=named, record=record, config=config)


# Studies


def of_study(given: str, study: StudyRecords, *, kind: Kind) -> GivenModel:
    """Return the best checkpoint of a study."""
    best = best_trial(study.trials(), maximize=study.spec.direction is Direction.MAXIMIZE)
    record = None if best is None else checkpoint_of(study, best.number, best.best_step)
    if best is None or record is None:
        what = "has no result yet" if best is None else f"has no checkpoint of trial {best.number} here"
        raise UserError(
            f"study {study.spec.name!r} {what}.",
            remedy="Go on with it: autosft tune --study NAME, with the same flags.",
        )
    return GivenModel(given=given, kind=kind, source=record.path, study=study, record=record)


def checkpoint_of(study: StudyRecords, trial: int, step: int | None) -> CheckpointRecord | None:
    """Return the record of a trial's checkpoint that this machine can load, None where it has none."""
    return next(
        (
            record
            for record in study.checkpoints()
            if (record.trial, record.step) == (trial, step)
            and (is_url(record.path) or Path(record.path).is_dir())
        ),
        None,
    )


def base_named_by(model: GivenModel) -> str | None:
    """Return the model that this one was tuned from, None where nothing here says."""
    if model.study is not None:
        return model.study.spec.model
    if model.config is not None:
        return model.config.model.name
    adapter = Path(model.source) / ADAPTER_CONFIG
    if not adapter.is_file():
        return None
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return str(base) if base else None
