"""A study that is resumed keeps the optimizer and the way of holding weights that it was begun with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.optimizers import DEFAULT
from autosft.profiles.recipe import Precision
from autosft.scheduler.events import Note, StudyEvent
from autosft.scheduler.setup.design import design_study, study_name
from autosft.scheduler.setup.recorded_numerics import as_recorded, former_defaults, with_recorded_way
from autosft.studies.request import read_request
from autosft.studies.search.dimensions import Choices, Dimension, Fixed
from autosft.studies.store.records import open_records
from tests.scheduler.setup.test_design import card, facts
from tests.studies.study_examples import spec

FORMER = Fixed(value="adamw_torch")
REQUEST = {"model": "m", "data": "d", "method": "full"}


@dataclass(frozen=True)
class Case:
    stored: dict[str, Dimension]  # optimizers of studies by name; UNNAMED: as a request without one is called
    expect: str
    request: dict[str, Any] = field(default_factory=dict)


UNNAMED = "(unnamed)"
CASES = {
    "a new study": Case(stored={}, expect=DEFAULT),
    "another study has the former default": Case(stored={"other": FORMER}, expect=DEFAULT),
    "resumed by its name": Case(stored={"mine": FORMER}, request={"study": "mine"}, expect="adamw_torch"),
    "found by its inputs": Case(stored={UNNAMED: FORMER}, expect="adamw_torch"),
    "begun with today's default": Case(
        stored={"mine": Fixed(value=DEFAULT)}, request={"study": "mine"}, expect=DEFAULT
    ),
    "searched": Case(
        stored={"mine": Choices(values=("adamw_torch", "sgd"))}, request={"study": "mine"}, expect=DEFAULT
    ),
    "asked for": Case(
        stored={"mine": FORMER},
        request={"study": "mine", "space": {"optimizer": "adafactor"}},
        expect="adafactor",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_which_optimizer_a_study_is_gone_on_with(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    request, known_facts = read_request({**REQUEST, **case.request}, None), facts([card(80)])
    design = design_study(request, known_facts)
    former_name = study_name(request, known_facts, design.basis.space.changed(optimizer=FORMER))
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    records = open_records(url)
    for study, optimizer in case.stored.items():
        called = former_name if study == UNNAMED else study
        space = spec().space.changed(optimizer=optimizer)
        records.open_study(replace(spec(), name=called, space=space), now=0.0)
    records.close()

    said: list[StudyEvent] = []
    resumed = as_recorded(request, known_facts, design, former_defaults(request, url), said.append)

    again = design if resumed is request else design_study(resumed, known_facts)
    assert again.basis.settings.optimizer == case.expect
    if case.expect == "adamw_torch":
        assert again.name == (request.study or former_name)
        assert [note.message for note in said if isinstance(note, Note)] == [
            f"Study {again.name} keeps --optimizer adamw_torch, with which it was begun; "
            f"the default is now {DEFAULT}."
        ]
    else:
        assert not said


HELD = {
    "lean": (Precision.BF16_STOCHASTIC, "adamw_torch_8bit", "lean", "full"),
    "leanest": (Precision.BF16_STOCHASTIC, "adamw_torch_4bit", "leanest", "sparse"),
    "exact": (Precision.BF16_AUTOCAST, DEFAULT, "exact", "full"),
    "LoRA": (Precision.BF16, DEFAULT, "exact", "lora"),
}


@pytest.mark.parametrize("name", HELD)
def test_memory_auto_stays_what_it_was_chosen_to_be(name: str, tmp_path: Path) -> None:
    precision, optimizer, memory, method = HELD[name]
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    records = open_records(url)
    made = spec()
    space = made.space.changed(optimizer=Fixed(value=optimizer), method=Fixed(value=method))
    records.open_study(
        replace(made, name="mine", space=space, pinned=replace(made.pinned, precision=precision)), now=0.0
    )
    records.close()
    request = read_request({"model": "m", "data": "d", "study": "mine", "memory": "auto"}, None)
    resumed = with_recorded_way(request, url)
    assert (resumed.memory, resumed.method) == (memory, method)
    for other in ({"study": "other"}, {"memory": "lean"}):
        asked = request.model_copy(update=other)
        assert with_recorded_way(asked, url) is asked


def test_without_a_database_there_are_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"
    assert former_defaults(read_request(REQUEST, None), url) == {}
    assert not (tmp_path / "none.db").exists()
