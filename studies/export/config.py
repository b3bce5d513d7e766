"""`best.yaml`: a trial's configuration, complete enough to be run again anywhere, and its reader.

What changes the result (settings, pinned) is binding; the plan is informative, since another machine plans
for its own devices.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autosft.profiles.bounded_yaml import construct, read_bounded
from autosft.profiles.errors import UserError
from autosft.studies.metrics import prompt_metric
from autosft.studies.request import TuneRequest
from autosft.studies.results.summary import best_measurement
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings, TrialRecord
from autosft.studies.values import Direction, StudySpec
from autosft.studies.wire import WireError, from_plain, to_plain

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The model that the configuration was found with."""

    name: str  # folder or hub id
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """The data that the configuration was found with."""

    source: str  # as the user wrote it
    fingerprint: str
    options: Any = None  # how it was prepared; any YAML value
    tokens_fingerprint: str = ""  # of the training tokens: does not depend on library versions


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """The prompts that every checkpoint answered, if the study's metric uses prompts."""

    source: str  # hub id or file, as the user wrote it
    max_new_tokens: int
    seed: int  # of their order


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the trial measured, to compare a rerun with."""

    metric: str
    value: float
    step: int | None  # optimizer step of the best checkpoint
    num_tokens: int | None  # training tokens seen by then
    final_value: float | None  # at the end of the run
    peak_allocated_bytes: int | None
    minimize: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedConfig:
    """The contents of `best.yaml`."""

    format: int
    autosft: str  # version that wrote it
    study: str
    trial: int
    model: ModelSource
    data: DataSource
    settings: TrainingSettings
    pinned: PinnedSettings
    expected: Expected
    plan: ExecutionPlan | None  # informative: planned again where it is run
    environment: Any = None  # hardware, versions, git state; informative
    prompts: PromptSource | None = None  # if the metric uses prompts


def exported(spec: StudySpec, trial: TrialRecord, *, tokens_fingerprint: str = "") -> ExportedConfig:
    """Return the configuration of a trial that has a value."""
    assert trial.value is not None, "only a trial that was evaluated is worth exporting"
    at = best_measurement(trial)
    peaks = [
        measurement.peak_allocated_bytes
        for measurement in trial.measurements
        if measurement.peak_allocated_bytes
    ]
    return ExportedConfig(
        format=FORMAT,
        autosft=importlib.metadata.version("autosft"),
        study=spec.name,
        trial=trial.number,
        model=ModelSource(name=spec.model, fingerprint=spec.model_fingerprint),
        data=DataSource(
            source=spec.data,
            fingerprint=spec.data_fingerprint,
            options=spec.data_options,
            tokens_fingerprint=tokens_fingerprint,
        ),
        settings=trial.settings,
        pinned=spec.pinned,
        expected=Expected(
            metric=spec.metric,
            value=trial.value,
            step=trial.best_step,
            num_tokens=None if at is None else at.num_tokens,
            final_value=trial.measurements[-1].metric(spec.metric) if trial.measurements else None,
            peak_allocated_bytes=max(peaks, default=None),
            minimize=spec.direction is Direction.MINIMIZE,
        ),
        plan=trial.plan,
        environment=spec.environment,
        prompts=prompts_of(spec),
    )


def prompts_of(spec: StudySpec) -> PromptSource | None:
    """Return the source of a study's prompts, from its request; None for metrics without prompts."""
    metric = prompt_metric(spec.metric)
    if metric is None:
        return None
    goal = dict(spec.environment.get("goal", {}))  # omits fields with default values
    source, max_new_tokens, seed = (
        goal.get(name, TuneRequest.model_fields[name].default)
        for name in (metric.data_setting, metric.length_setting, "seed")
    )
    return PromptSource(source=source, max_new_tokens=max_new_tokens, seed=seed)


_HEAD = """\
# The best configuration of study {study} (trial {trial}), found by autosft {version}.
# Run it again:  autosft train {file}
# `settings` and `pinned` decide what is learned; `plan` is informative, since every machine plans again.
"""


def as_yaml(config: ExportedConfig, *, file: str = "best.yaml") -> str:
    """Return a configuration as the text of a file of this name."""
    head = _HEAD.format(study=repr(config.study), trial=config.trial, version=config.autosft, file=file)
    return head + yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)


def write_config(path: Path, config: ExportedConfig) -> None:
    """Write a configuration atomically.  Raises UserError if the path cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(as_yaml(config, file=path.name), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {error.strerror}.", remedy="Choose another path."
        ) from error


def read_config(path: Path) -> ExportedConfig:
    """Read a configuration.  Raises UserError, with the line or the field, for an invalid file."""
    remedy = "Write it again with: autosft export STUDY"
    try:
        plain = construct(yaml.SafeLoader(read_bounded(path)))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.", remedy=remedy) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", remedy=remedy) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line} is not YAML: {getattr(error, 'problem', error)}.", remedy=remedy
        ) from error
    if not isinstance(plain, dict) or "format" not in plain:
        raise UserError(f"{path} is not a configuration that autosft has exported.", remedy=remedy)
    if plain["format"] != FORMAT:
        raise UserError(
            f"{path} has format {plain['format']!r}; this version of autosft reads format {FORMAT}.",
            remedy="Update it: pip install --upgrade autosft",
        )
    try:
        return from_plain(ExportedConfig, plain)
    except WireError as error:
        raise UserError(f"{path}: {str(error).removeprefix('ExportedConfig.')}.", remedy=remedy) from error
