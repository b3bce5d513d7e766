"""Warm start: the best settings of earlier studies on the same or a similar model and data.

Memory needs no such choice: the measurements of all studies in the database correct all predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autosft.studies.results.folds import fold_of
from autosft.studies.results.summary import ranked_trials
from autosft.studies.search.dimensions import Fixed, Range, Value
from autosft.studies.search.freeze_thaw.proposal import EarlierStudy
from autosft.studies.search.space import SearchSpace
from autosft.studies.store.records import Records
from autosft.studies.values import Direction, StudySpec

#: Number of an earlier study's best trials to try first.
NUM_TRIED = 2
#: How alike the effects of settings are at most, by rank of `similarity`; the last is for a study that is not
#: comparable but was asked for.  The search finds out whether they are (`gaussian_process.fit`).
LIKENESS = (1.0, 0.9, 0.8, 0.7, 0.5)
FARTHEST = len(LIKENESS) - 1
#: Earlier studies that a search learns from.
MAX_EARLIER = 3
#: Models of one architecture that differ in size by less than this factor learn alike at like settings.
MAX_SIZE_RATIO = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """What a new study takes over from earlier ones."""

    trials: tuple[Mapping[str, Value], ...]  # settings to try after the default configuration
    lines: tuple[str, ...]  # for the user


NOTHING = WarmStart(trials=(), lines=())


def warm_start(records: Records, spec: StudySpec, source: str) -> WarmStart:
    """Return what `spec`, a study without trials, takes over; `source` is auto, none or a study's name.

    auto takes the best settings of the nearest earlier study: one of the same method, on the same model or on
    one of its architecture and similar size, preferably with the same data.  A study given by name is used
    whatever its subject.  Raises UserError if there is no study of that name.
    """
    if source == "none" or records.find_study(spec.name) is not None:
        return NOTHING
    if source != "auto":
        return taken_from(records, source, spec, why="as asked")
    near = [
        (closeness, -study.created_at, study.spec.name, why)
        for study in records.studies()
        if study.best_value is not None and (found := similarity(study.spec, spec)) is not None
        for closeness, why in [found]
    ]
    if not near:
        return NOTHING
    _, _, name, why = min(near)
    return taken_from(records, name, spec, why=why)


def earlier_studies(records: Records, spec: StudySpec, source: str) -> tuple[EarlierStudy, ...]:
    """Return what a study's search learns from, the most alike first; `source` as for `warm_start`.

    Only trials that had ended when the study was created: they do not change any more, so that a study that
    is resumed decides as it did.
    """
    if source == "none":
        return ()
    overviews = records.studies()
    before = next((each.created_at for each in overviews if each.spec.name == spec.name), math.inf)
    near = []
    for study in overviews:
        found = similarity(study.spec, spec)
        is_asked = study.spec.name == source
        if study.spec.name == spec.name or not (is_asked or (source == "auto" and found)):
            continue
        closeness = FARTHEST if found is None else found[0]
        near.append((closeness, -study.created_at, study.spec.name))
    studies = []
    for closeness, _, name in sorted(near)[:MAX_EARLIER]:
        earlier = records.read_study(name)
        ended = tuple(
            trial
            for trial in earlier.trials()
            if trial.state.is_over and trial.finished_at is not None and trial.finished_at < before
        )
        studies.append(
            EarlierStudy(
                name=name,
                likeness=LIKENESS[closeness],
                num_evaluations=earlier.spec.pinned.num_evaluations,
                trials=ended,
            )
        )
    return tuple(study for study in studies if study.trials)


def similarity(earlier: StudySpec, now: StudySpec) -> tuple[int, str] | None:
    """Return (rank, description) of an earlier study, 0 being the nearest; None if it is not comparable.

    For one fold of a cross-validation, no study on other parts of the same data is.
    """
    if earlier.metric != now.metric or earlier.space["method"] != now.space["method"]:
        return None
    same_model = earlier.model_fingerprint == now.model_fingerprint
    if not same_model and not _are_similar(_model_of(earlier), _model_of(now)):
        return None
    same_data = earlier.data_fingerprint == now.data_fingerprint
    if fold_of(now) is not None and earlier.data == now.data and not same_data:
        return None  # its settings were chosen with the examples that this fold is scored on
    model = "the same model" if same_model else "a model of the same architecture and size"
    data = "the same data" if same_data else "other data"
    return (0 if same_model else 2) + (0 if same_data else 1), f"{model}, {data}"


def _model_of(spec: StudySpec) -> Mapping[str, Any]:
    environment = spec.environment if isinstance(spec.environment, Mapping) else {}
    model = environment.get("model")  # the first version did not record it
    return model if isinstance(model, Mapping) else {}


def _are_similar(model: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    first, second = int(model.get("num_parameters", 0)), int(other.get("num_parameters", 0))
    if not first or not second or model.get("architecture") != other.get("architecture"):
        return False
    return max(first, second) <= MAX_SIZE_RATIO * min(first, second)


def taken_from(records: Records, name: str, spec: StudySpec, *, why: str) -> WarmStart:
    """Take over the best settings of a study, moved into the new study's search space where necessary."""
    study = records.read_study(name)
    best = ranked_trials(study.trials(), maximize=study.spec.direction is Direction.MAXIMIZE)
    found: list[dict[str, Value]] = []
    moved: list[str] = []
    for trial in best:
        parameters, changes = into_space(dict(trial.parameters), spec.space)
        if parameters and parameters not in found:
            found.append(parameters)
            moved += changes
        if len(found) == NUM_TRIED:
            break
    if not found:
        return WarmStart(trials=(), lines=(f"Warm start: study {name} has no trial to learn from.",))
    line = f"Warm start: the best {len(found)} of study {name} ({why}) are tried after the default"
    line += f"; moved into this study's space: {', '.join(moved)}" if moved else ""
    return WarmStart(trials=tuple(found), lines=(f"{line}. To skip this: --warm-start none.",))


def into_space(
    parameters: Mapping[str, Value], space: SearchSpace
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return those of `parameters` that the space searches, each clipped to the nearest value in it."""
    here: dict[str, Value] = {}
    moved = []
    for name, value in parameters.items():
        dimension = space.as_mapping().get(name)
        if dimension is None or isinstance(dimension, Fixed):
            continue
        if value in dimension:
            here[name] = value
        elif isinstance(dimension, Range):
            if isinstance(value, str):
                continue  # text where the space now has a range of numbers
            here[name] = dimension.nearest(value)
        else:
            here[name] = dimension.nearest(value)
        if here[name] != value:
            moved.append(f"{name} {here[name]} instead of {value}")
    return here, tuple(moved)
