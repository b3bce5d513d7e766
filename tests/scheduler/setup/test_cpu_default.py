"""In which precision a study on CPUs trains that asks for none, and that it stays what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.recipe import MemoryEstimate, Precision, StepRecipe
from autosft.scheduler.decide.planner import Costs
from autosft.scheduler.events import Note, StudyEvent
from autosft.scheduler.setup.design import Design, design_study
from autosft.scheduler.setup.plan_summary import precision_lines
from autosft.scheduler.setup.recorded_numerics import with_recorded_precision
from autosft.studies.request import TuneRequest, read_request
from autosft.studies.store.records import open_records
from tests.scheduler.devices import GIB
from tests.scheduler.model import MODEL
from tests.scheduler.setup.test_design import CPU, StubModels, card, facts, memory, speed
from tests.studies.study_examples import spec

ABLE = replace(CPU, supports_bf16=True)
REQUEST = {"model": "models/small", "data": "data/chats.jsonl", "method": "lora"}


class CpuModels(StubModels):
    """Steps in bf16 autocast are `gain` times as fast as in fp32, and hold `more` bytes."""

    model = MODEL

    def __init__(self, gain: float, more: int = 0) -> None:
        self.gain, self.more = gain, more
        self.costs = Costs(memory=self.memory, speed=speed)

    def memory(
        self, recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
    ) -> MemoryEstimate:
        made = memory(recipe, micro_batch, seq_len, device)
        more = self.more if recipe.precision is Precision.BF16_AUTOCAST else 0
        return replace(made, outside_bytes=made.outside_bytes + more)

    def uncorrected_step(self, recipe: StepRecipe, *_: object, **__: object) -> Any:
        return SimpleNamespace(step_s=self.gain if recipe.precision is Precision.FP32 else 1.0)


@dataclass(frozen=True)
class Case:
    expect: Precision
    devices: Sequence[DeviceProfile] = (ABLE,)
    gain: float = 2.0
    more: int = 0
    request: dict[str, Any] = field(default_factory=dict)


CASES = {
    "twice as fast": Case(expect=Precision.BF16_AUTOCAST),
    "hardly faster": Case(expect=Precision.FP32, gain=1.1),
    "no instructions": Case(expect=Precision.FP32, devices=(CPU,)),
    "one node without them": Case(expect=Precision.FP32, devices=(ABLE, replace(CPU, uuid="CPU-other"))),
    "fits in fp32 alone": Case(expect=Precision.FP32, more=64 * GIB),
    "asked for": Case(expect=Precision.FP32, request={"precision": "fp32"}),
    "a GPU": Case(expect=Precision.BF16, devices=(card(80),)),
}


def designed(case: Case) -> Design:
    request = TuneRequest(**{**REQUEST, **case.request})
    return design_study(request, facts(case.devices, models=CpuModels(case.gain, case.more)))


@pytest.mark.parametrize("name", CASES)
def test_the_precision_of_a_study_that_asks_for_none(name: str) -> None:
    case = CASES[name]
    basis = designed(case).basis
    assert basis.pinned.precision is case.expect
    said = " ".join(precision_lines(basis))
    if case.expect is Precision.BF16_AUTOCAST:
        assert "2.0 times as fast as --precision fp32" in said
    else:
        assert said == ""


@pytest.mark.parametrize(
    ("stored", "expect"),
    [
        (Precision.FP32, "fp32"),
        (Precision.BF16_AUTOCAST, "auto"),
        (None, "auto"),
    ],
    ids=["begun in fp32", "begun in bf16", "a new study"],
)
def test_a_study_keeps_the_precision_with_which_it_was_begun(
    stored: Precision | None, expect: str, tmp_path: Path
) -> None:
    made = designed(CASES["twice as fast"])
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    records = open_records(url)
    if stored is not None:
        begun = replace(spec(), name=made.name, pinned=replace(made.basis.pinned, precision=stored))
        records.open_study(begun, now=0.0)
    records.close()
    said: list[StudyEvent] = []
    request = read_request({**REQUEST, "storage": url}, None)
    kept = with_recorded_precision(request, made, said.append)
    assert kept.precision == expect
    assert (kept is request) is (expect == "auto")
    notes = [note.message for note in said if isinstance(note, Note)]
    assert notes == (
        [] if expect == "auto" else [f"Study {made.name} keeps --precision fp32, with which it was begun."]
    )
    again = design_study(kept, facts([ABLE], models=CpuModels(2.0)))
    assert again.name == made.name
