"""What a study that is resumed has in common by choice of the version or the machine that began it.

Which implementation of AdamW takes the steps is part of that: a study that an earlier version began with its
default is gone on with that one, and says so.  So is the way in which `--memory auto` holds what is trained:
it was chosen for the memory that was free then.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from autosft.profiles.memory_ways import AUTO, EXACT, LEAN_WAYS
from autosft.profiles.optimizers import DEFAULT, FORMER_DEFAULTS
from autosft.scheduler.events import Note, Observer
from autosft.scheduler.setup.design import Design, study_name
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.setup.template_date import is_there
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Fixed
from autosft.studies.store.database import default_storage_url
from autosft.studies.store.records import open_records


def former_defaults(request: TuneRequest, storage_url: str) -> Mapping[str, str]:
    """Return the studies that a request without an optimizer may resume: name -> an earlier default."""
    if "optimizer" in request.space or not is_there(storage_url):
        return {}
    with closing(open_records(storage_url)) as records:
        fixed = {study.spec.name: study.spec.space["optimizer"] for study in records.studies()}
    return {
        name: str(dimension.value)
        for name, dimension in fixed.items()
        if isinstance(dimension, Fixed) and dimension.value in FORMER_DEFAULTS
    }


def with_recorded_way(request: TuneRequest, storage_url: str) -> TuneRequest:
    """Return a request for the method and the way that `--memory auto` has chosen for the study before.

    A study without a name is found by its name, which the way is part of: where another way fits now, it is
    another study.
    """
    if request.memory != AUTO or request.study is None or not is_there(storage_url):
        return request
    with closing(open_records(storage_url)) as records:
        specs = [study.spec for study in records.studies() if study.spec.name == request.study]
    if not specs:
        return request
    space, precision = specs[0].space, specs[0].pinned.precision
    held = {(way.precision, Fixed(value=way.optimizer or "")): way for way in LEAN_WAYS}
    way = next((way for key, way in held.items() if key == (precision, space["optimizer"])), EXACT)
    method = str(space["method"].start())
    return request.model_copy(update={"memory": way.name, "method": method})


def with_recorded_precision(request: TuneRequest, design: Design, observe: Observer) -> TuneRequest:
    """Return a request for the precision of the study that it resumes, else the request.

    Where none is asked for, the default depends on the version of autosft and on the rates of this CPU.
    """
    storage_url = request.storage or default_storage_url()
    if request.precision != "auto" or not is_there(storage_url):
        return request
    with closing(open_records(storage_url)) as records:
        spec = records.find_study(design.name)
    if spec is None or spec.pinned.precision is design.basis.pinned.precision:
        return request
    precision = spec.pinned.precision.value
    observe(Note(message=f"Study {design.name} keeps --precision {precision}, with which it was begun."))
    return request.model_copy(update={"precision": precision, "study": design.name})


def as_recorded(
    request: TuneRequest, facts: StudyFacts, design: Design, known: Mapping[str, str], observe: Observer
) -> TuneRequest:
    """Return a request for the optimizer of the study that it resumes, else the request.

    A study without a name is found by what it would have been called with an earlier default.
    """
    if design.basis.way is not EXACT:
        return request
    space = design.basis.space
    for optimizer in FORMER_DEFAULTS:
        before = space.changed(optimizer=Fixed(value=optimizer))
        name = request.study or study_name(request, facts, before)
        if known.get(name) == optimizer:
            said = f"Study {name} keeps --optimizer {optimizer}, with which it was begun"
            observe(Note(message=f"{said}; the default is now {DEFAULT}."))
            return request.model_copy(update={"space": {**request.space, "optimizer": optimizer}})
    return request
