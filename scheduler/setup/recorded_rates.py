"""Studies with the default learning rates of an earlier version, which keep them when they are resumed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from autosft.profiles.optimizers import FORMER_DEFAULTS
from autosft.scheduler.events import Note, Observer
from autosft.scheduler.setup.design import Design, study_name
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.setup.template_date import is_there
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Dimension, Fixed
from autosft.studies.search.space import ADAPTER_METHODS, earlier_learning_rates
from autosft.studies.store.database import default_storage_url
from autosft.studies.store.records import open_records


def recorded_rates(
    request: TuneRequest, facts: StudyFacts, design: Design, observe: Observer
) -> Mapping[str, Dimension]:
    """Return the learning rates of the study that a request resumes, if those are of before; else nothing.

    Those of adapters followed the size of the model before, and a study that searches them goes on with them.
    A study without a name is found by what it would have been called with them, and with the optimizer that
    was the default then.
    """
    space, storage_url = design.basis.space, request.storage or default_storage_url()
    if "learning_rate" in request.space or not space.methods() <= ADAPTER_METHODS:
        return {}
    if not is_there(storage_url):
        return {}
    rates = earlier_learning_rates(num_parameters=facts.model.num_parameters)
    before = space.changed(learning_rate=rates)
    spaces = [before, *(before.changed(optimizer=Fixed(value=name)) for name in FORMER_DEFAULTS)]
    names = [request.study] if request.study else [study_name(request, facts, each) for each in spaces]
    with closing(open_records(storage_url)) as records:
        found = [stored for name in names if (stored := records.find_study(name)) is not None]
    if not found or found[0].space["learning_rate"] != rates:
        return {}
    observe(Note(message=f"Study {found[0].name} keeps the learning rates with which it was begun: {rates}."))
    return {"learning_rate": rates}


def with_dimensions(request: TuneRequest, dimensions: Mapping[str, Dimension]) -> TuneRequest:
    """Return the request to design a study with; what is recorded as asked for is the request itself."""
    return request.model_copy(update={"space": {**request.space, **dimensions}})
