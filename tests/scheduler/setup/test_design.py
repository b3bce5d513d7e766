"""What a study is designed to be: tables of requests and devices, and what is decided for them."""

from __future__ import annotations

import builtins
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.dataset.formats import DataFormat
from autosft.profiles.dataset.prepared import PreparedData, SplitCounts
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind, DeviceProfile
from autosft.profiles.recipe import (
    ByteRange,
    Checkpointing,
    LengthProfile,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.profiles.user_code import UserCode
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.planner import Costs, DoesNotFitError, StepSpeed
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.setup.design import Design, design_study
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.study_run import Slots
from autosft.studies.request import TuneRequest, read_request
from autosft.studies.search.dimensions import Choices, Fixed
from autosft.studies.trial import TrainingSettings
from tests.plans import memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.model import MODEL

NUM_EXAMPLES = 1000
DEFAULT_SEQ_LEN = 128


def memory(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
    """16 GiB of full state (4 of adapters), split over shards; 1 GiB an example of 128 tokens."""
    fixed = 16 * GIB if recipe.method is Method.FULL else 4 * GIB
    shards = recipe.data_parallel if recipe.sharding is Sharding.FSDP else 1
    share = 1 if recipe.checkpointing is Checkpointing.OFF else 4
    need = fixed // shards + micro_batch * GIB * seq_len // 128 // share
    return dataclasses.replace(
        memory_estimate(), need=ByteRange(median_bytes=need, upper_bytes=need), outside_bytes=0
    )


def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    """An hour for a full run; a trial keeps its device busy for half of the time."""
    return StepSpeed(tokens_per_s=1000.0 * micro_batch, run_s=3600.0, device_share=0.5)


class StubModels:
    """The cost models above, over ten evaluation examples with their answers from token 50 on."""

    costs = Costs(memory=memory, speed=speed)
    speed = staticmethod(speed)

    @staticmethod
    def eval_lengths(seq_len: int) -> LengthProfile:
        scored = 10 if seq_len > 50 else 0
        return LengthProfile(lengths=(min(100, seq_len),) * 10, scored=(scored,) * 10, max_length=seq_len)

    @staticmethod
    def evaluation_s(*_: object, **__: object) -> float:
        return 60.0


def counts(num_examples: int) -> SplitCounts:
    return SplitCounts(
        num_examples=num_examples,
        num_turns=2 * num_examples,
        num_tokens=100 * num_examples,
        num_scored=50 * num_examples,
        median_length=100,
        p95_length=120,
        longest=400,
    )


DATA = PreparedData(
    path=Path("there is no such folder"),
    source="data/chats.jsonl",
    eval_source=None,
    format=DataFormat.MESSAGES,
    fingerprint="d" * 64,
    tokenizer="models/small",
    own_template=False,
    eos_token_id=1,
    train=counts(NUM_EXAMPLES),
    eval=counts(10),
    final=counts(10),
    skipped=(),
    num_duplicates_removed=0,
    num_capped=0,
    notes=(),
    samples=(),
)


def card(gib: int, index: int = 0, **changes: Any) -> DeviceProfile:
    """A GPU with so much memory free; its cap takes all of it."""
    made = gpu(index, free_bytes=gib * GIB)
    return dataclasses.replace(made, name=f"{gib} GB", total_bytes=gib * GIB, **changes)


CPU = dataclasses.replace(
    card(64), kind=DeviceKind.CPU, name="CPU", num_cores=4, compute_capability=None, supports_bf16=False
)
OLD = {"compute_capability": (7, 5), "supports_bf16": False}


def facts(devices: Sequence[DeviceProfile], **changes: Any) -> StudyFacts:
    made = StudyFacts(
        hardware=ClusterProfile(devices=tuple(devices), driver_version=None, cuda_version=None),
        model=MODEL,
        data=DATA,
        models=StubModels(),  # type: ignore[arg-type]
        data_name="chats",
        default_seq_len=DEFAULT_SEQ_LEN,
        eval_fingerprint=lambda seq_len: f"evaluated at {seq_len}",
    )
    return dataclasses.replace(made, **changes)


def design(devices: Sequence[DeviceProfile], **request: Any) -> Design:
    given = TuneRequest(model="models/small", data="data/chats.jsonl", **request)
    return design_study(given, facts(devices))


def decided(made: Design) -> dict[str, Any]:
    """Return what is decided, under the names that the table uses."""
    basis = made.basis
    return {
        "name": made.name,
        "method": made.participants.method,
        "used": [device.name for device in made.participants.devices],
        "left out": [device.name for device in made.participants.left_out],
        "devices a trial": made.participants.devices_per_trial,
        "slots": [(slots.num_slots, slots.num_threads) for slots in made.slots],
        "precision": basis.pinned.precision,
        "tf32": basis.pinned.tf32,
        "lengths": basis.space["seq_len"],
        "batches": basis.space["effective_batch_size"],
        "learning rate": basis.settings.learning_rate,
        "examples": basis.fixed.num_train_examples,
        "evaluated at": (basis.pinned.eval_seq_len, basis.pinned.eval_fingerprint),
        "evaluation batch": basis.pinned.eval_micro_batch,
        "micro batch": basis.plan.micro_batch,
        "sharding": basis.plan.sharding,
        "trials": made.budget.num_trials,
        "rule": made.rule,
        "first": [origin for _, origin in made.strategies],
    }


@dataclass(frozen=True)
class Case:
    name: str
    expect: dict[str, Any]
    devices: Sequence[DeviceProfile] = (card(80),)
    request: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(
        "what is decided where nothing is asked for",
        {
            "method": Method.FULL,
            "used": ["80 GB"],
            "left out": [],
            "devices a trial": 1,
            "precision": Precision.BF16_AUTOCAST,
            "tf32": True,
            "lengths": Fixed(value=128),
            "batches": Choices(values=(8, 16, 32), default=16),
            "examples": 3 * NUM_EXAMPLES,
            "evaluated at": (128, "evaluated at 128"),
            "trials": 20,
            "rule": PruningRule(num_rungs=4, thaws=True),
            "first": [],
        },
    ),
    Case("a CPU computes in fp32", {"precision": Precision.FP32, "tf32": False}, [CPU]),
    Case("a trial a core where memory allows it", {"slots": [(2, 2)]}, [CPU]),
    Case(
        "an older GPU has neither bf16 nor TF32",
        {"precision": Precision.FP16_AUTOCAST, "tf32": False},
        [card(80, **OLD)],
    ),
    Case(
        "numerics are the least capable device's",
        {"precision": Precision.FP16_AUTOCAST, "tf32": False, "used": ["40 GB", "80 GB"]},
        [card(80, 0), card(40, 1, **OLD)],
    ),
    Case("adapters are pure bf16", {"precision": Precision.BF16}, request={"method": "lora"}),
    Case("a precision that is asked for", {"precision": Precision.FP32}, request={"precision": "fp32"}),
    Case("LoRA where full does not fit", {"method": Method.LORA, "micro batch": 16}, [card(10)]),
    Case(
        "a gang where neither fits one device",
        {"method": Method.FULL, "devices a trial": 8, "sharding": Sharding.FSDP, "slots": [(1, 1)] * 8},
        [card(4, index) for index in range(8)],
    ),
    Case(
        "too small a device is left out", {"used": ["80 GB"], "left out": ["8 GB"]}, [card(8, 0), card(80, 1)]
    ),
    Case("two that half keep a GPU busy", {"slots": [(2, 1)]}),
    Case("one where the memory is for one", {"slots": [(1, 1)]}, [card(24)]),
    Case(
        "all of a GPU where trials run one at a time",
        {"slots": [(1, 1)], "micro batch": 128},
        request={"space": {"effective_batch_size": 128}, "max_concurrent": 1},
    ),
    Case("no more at once than allowed", {"slots": [(1, 1)]}, request={"max_concurrent": 1}),
    Case(
        "a length that is asked for",
        {"lengths": Fixed(value=256), "evaluated at": (256, "evaluated at 256")},
        request={"space": {"seq_len": 256}},
    ),
    Case(
        "lengths to search are compared at the longest",
        {"lengths": Choices(values=(64, 256), default=256), "evaluated at": (256, "evaluated at 256")},
        request={"space": {"seq_len": [64, 256]}},
    ),
    Case(
        "batches that are asked for",
        {"batches": Fixed(value=12)},
        request={"space": {"effective_batch_size": 12}},
    ),
    Case(
        "a learning rate that is asked for",
        {"learning rate": 3e-4},
        request={"space": {"learning_rate": 3e-4}},
    ),
    Case("part of the examples", {"examples": 50}, request={"max_train_samples": 100, "epochs": 0.5}),
    Case(
        "few examples, small batches",
        {"batches": Choices(values=(8, 16), default=8)},
        request={"epochs": 0.2},
    ),
    Case("trials that are asked for", {"trials": 7}, request={"trials": 7}),
    Case("as many trials as the time holds", {"trials": 7}, request={"time_budget": "2h"}),
    Case(
        "no pruning",
        {"rule": PruningRule(num_rungs=6, min_peers=1 << 30)},
        request={"prune": False, "rungs": "pause", "evaluations": 6},
    ),
    Case("stopping at rungs", {"rule": PruningRule(num_rungs=4)}, request={"rungs": "stop"}),
    Case("pausing at rungs", {"rule": PruningRule(num_rungs=4, pauses=True)}, request={"rungs": "pause"}),
    Case("a name that is given", {"name": "mine"}, request={"study": "mine"}),
    Case(
        "strategies of a preset come first",
        {"first": ["laptop-8gb A", "laptop-8gb B", "laptop-8gb minimal"]},
        request={"preset": "laptop-8gb", "space": {"seq_len": 128, "effective_batch_size": 16}},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_decided(case: Case) -> None:
    found = decided(design(case.devices, **case.request))
    assert {name: found[name] for name in case.expect} == case.expect


@pytest.mark.parametrize(("at_once", "num_threads", "micro_batch"), [(1, 4, 16), (4, 1, 1)])
def test_the_plan_is_for_the_threads_that_trials_will_have(
    at_once: int, num_threads: int, micro_batch: int
) -> None:
    def by_threads(recipe: StepRecipe, micro_batch: int, *rest: Any) -> StepSpeed:
        # One thread is as fast with any batch; several are faster with larger ones.
        faster = micro_batch if rest[-1] > 1 else 1
        return StepSpeed(tokens_per_s=1000.0 * faster, run_s=3600.0, device_share=0.5)

    class Models(StubModels):
        costs = Costs(memory=memory, speed=by_threads)

    given = TuneRequest(model="models/small", data="data/chats.jsonl", trials=20, max_concurrent=at_once)
    made = design_study(given, facts([CPU], models=Models()))
    assert made.slots[0].num_threads == num_threads
    assert (made.basis.plan.num_threads, made.basis.plan.micro_batch) == (num_threads, micro_batch)


LARGE = [card(80)]
REFUSED: dict[str, tuple[Sequence[DeviceProfile], dict[str, Any], str]] = {
    "nothing fits": ([card(2)], {}, r"needs 4\.2 GiB"),
    "what is asked for does not fit": ([card(10)], {"method": "full"}, "full fine-tuning at length 128"),
    "fp16 on a CPU": ([CPU], {"method": "lora", "precision": "fp16-autocast"}, "needs a GPU"),
    "pure fp16 weights": (LARGE, {"method": "full", "precision": "fp16"}, "--precision fp16"),
    "longer than the model": (LARGE, {"space": {"seq_len": 1024}}, "1024 is above 512"),
    "a batch larger than the run": (
        LARGE,
        {"max_train_samples": 10, "space": {"effective_batch_size": 64}},
        "64 is above 30",
    ),
    "answers cut off": (LARGE, {"space": {"seq_len": 32}}, "has an answer within the first 32 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    devices, request, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        design(devices, **request)


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(DoesNotFitError) as raised:
        design([card(2)])
    assert raised.value.settings.method is Method.LORA


def test_user_code_and_prompts_are_pinned() -> None:
    loss = UserCode(name="mine:loss", fingerprint="f" * 64)
    made = design_study(TuneRequest(model="m", data="d"), facts([card(80)], loss=loss))
    assert made.basis.pinned.loss == loss
    assert made.basis.pinned.prompts_fingerprint == ""


OTHER = [
    {"metric": "eval_token_accuracy"},
    {"evaluations": 5},
    {"epochs": 2.0},
    {"max_train_samples": 500},
    {"precision": "fp32"},
    {"seed": 1},
    {"method": "lora"},
    {"method": "lora", "adapter": "dora"},
    {"space": {"weight_decay": 0.1}},
]
SAME = [{"trials": 3}, {"time_budget": "3h"}, {"prune": False}, {"max_concurrent": 1}, {"keep_best": 1}]


def test_the_name_tells_studies_apart_that_cannot_be_compared() -> None:
    name = design([card(80)]).name
    assert name.startswith("small-chats-")
    assert {design([card(80)], **request).name for request in SAME} == {name}
    others = {design([card(80)], **request).name for request in OTHER}
    assert len(others | {name}) == len(OTHER) + 1


def test_a_device_that_joins_is_shared_as_those_alike_or_not_at_all() -> None:
    made = design([card(80, 0)])
    assert made.share(card(80, 7)) == Slots(device=card(80, 7), num_slots=2, num_threads=1)
    assert made.share(card(80, 7, **OLD)) is None
    assert made.share(CPU) is None


def test_designing_asks_no_clock_and_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    request = read_request({"model": "m", "data": "d", "time_budget": "2h", "preset": "laptop-8gb"}, None)
    before = decided(design_study(request, facts([card(80)])))  # what is imported and cached, is now

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not pure")

    with monkeypatch.context() as patch:
        for owner, name in ((builtins, "open"), (Path, "open"), (Path, "exists"), (time, "time")):
            patch.setattr(owner, name, refuse)
        after = decided(design_study(request, facts([card(80)])))
    assert after == before


def test_stub_models_answer_what_the_real_ones_are_asked() -> None:
    asked = [name for name in vars(StubModels) if not name.startswith("_")]
    real = Models(MODEL, lambda *_: LengthProfile(lengths=(1,), scored=(1,), max_length=1))
    assert all(hasattr(real, name) for name in asked)
