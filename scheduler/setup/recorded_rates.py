"""Studies with the default learning rates of an earlier version, which keep them when they are resumed."""

from __future__ import annotations

from contextlib import closing

from autosft.scheduler.setup.design import Design, study_name
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.setup.template_date import is_there
from autosft.studies.request import TuneRequest
from autosft.studies.search.space import ADAPTER_METHODS, earlier_learning_rates
from autosft.studies.store.database import default_storage_url
from autosft.studies.store.records import open_records


def request_as_recorded(request: TuneRequest, facts: StudyFacts, design: Design) -> TuneRequest | None:
    """Return the request with the learning rates of the study that it resumes; None without such a study.

    Those of adapters followed the size of the model before, and a study that searches them goes on with them.
    """
    space, storage_url = design.basis.space, request.storage or default_storage_url()
    if "learning_rate" in request.space or not space.methods() <= ADAPTER_METHODS:
        return None
    if not is_there(storage_url):
        return None
    rates = earlier_learning_rates(num_parameters=facts.model.num_parameters)
    earlier_space = space.changed(learning_rate=rates)
    name = request.study or study_name(request, facts, earlier_space)
    with closing(open_records(storage_url)) as records:
        stored = records.find_study(name)
    if stored is None or stored.space["learning_rate"] != rates:
        return None
    return request.model_copy(update={"space": {**request.space, "learning_rate": rates}})
