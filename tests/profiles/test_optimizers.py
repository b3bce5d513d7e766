"""The table of optimizers: what it says of bytes, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from autosft.profiles import optimizers
from autosft.profiles.errors import UserError
from autosft.profiles.optimizers import OPTIMIZERS, find_optimizer, listing, require_optimizer
from autosft.profiles.recipe import Method, Precision
from autosft.studies.search.parsing import parse_dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    name: str
    shape: tuple[int, ...]
    weight_bytes: int = 4
    is_embedding: bool = False
    expect: int


KEPT = {
    "AdamW: two moments and a count of steps": Kept(name="adamw_torch", shape=(8, 8), expect=2 * 64 * 4 + 4),
    "of 16-bit weights, as they are": Kept(
        name="adamw_torch", shape=(8, 8), weight_bytes=2, expect=2 * 64 * 2 + 4
    ),
    "blocks of 256 that are not full count": Kept(
        name="adamw_8bit", shape=(4100,), expect=2 * (4100 + 4 * 17)
    ),
    "a small tensor keeps fp32": Kept(name="adamw_8bit", shape=(4095,), weight_bytes=2, expect=2 * 4 * 4095),
    "an embedding keeps fp32": Kept(
        name="adamw_8bit", shape=(64, 128), is_embedding=True, expect=2 * 4 * 8192
    ),
    "torchao quantizes embeddings too": Kept(
        name="adamw_torch_8bit", shape=(64, 128), is_embedding=True, expect=2 * (8192 + 4 * 32 + 1024) + 4
    ),
    "torchao: what blocks do not divide stays whole": Kept(
        name="adamw_torch_8bit", shape=(4100,), weight_bytes=2, expect=2 * 2 * 4100 + 4
    ),
    "half a byte": Kept(name="adamw_torch_4bit", shape=(64, 128), expect=2 * (4096 + 4 * 32 + 64) + 4),
    "three of AdEMAMix": Kept(name="ademamix", shape=(10,), expect=3 * 4 * 10),
    "rows and columns of a matrix": Kept(name="adafactor", shape=(30, 20), expect=4 * (30 + 20) + 4),
    "a vector has none": Kept(name="adafactor", shape=(30,), expect=4 * 30 + 4),
    "what rounding loses, of 16 bits": Kept(
        name="stable_adamw", shape=(10,), weight_bytes=2, expect=3 * 2 * 10 + 2
    ),
    "nothing": Kept(name="sgd", shape=(64, 128), expect=0),
}


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_bytes_that_are_kept_for_a_tensor(case: Kept) -> None:
    kept = find_optimizer(case.name).state
    assert kept is not None
    assert kept.bytes_of(case.shape, case.weight_bytes, is_embedding=case.is_embedding) == case.expect


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    name: str
    on_gpu: bool = True
    precision: Precision = Precision.FP32
    largest_decay: float = 0.0
    is_run_here: bool = False
    words: str
    remedy: str


ASKED = {
    "a misspelt name": Asked(name="adamw_troch", words="not an optimizer", remedy="Did you mean adamw_torch"),
    "an old name of ours": Asked(name="paged_adamw", words="not an optimizer", remedy="paged_adamw_32bit"),
    "a refused one": Asked(
        name="galore_adamw_layerwise", words="the base rate whatever", remedy="adamw_torch_8bit"
    ),
    "pages on a CPU": Asked(
        name="paged_adamw_8bit", on_gpu=False, words="needs a GPU", remedy="--optimizer adamw_8bit"
    ),
    "pages on a CPU, 32 bits": Asked(
        name="paged_adamw_32bit", on_gpu=False, words="needs a GPU", remedy="--optimizer adamw_torch"
    ),
    "pages on a CPU, AdEMAMix": Asked(
        name="paged_ademamix_32bit", on_gpu=False, words="needs a GPU", remedy="--optimizer ademamix."
    ),
    "decay through the gradient": Asked(
        name="rmsprop", largest_decay=0.1, words="in the size that is asked", remedy="--weight-decay 0"
    ),
    "decay through the gradient, in a study of an earlier version": Asked(
        name="adagrad", largest_decay=0.1, words="in the size that is asked", remedy="keeps its trials"
    ),
    "averages of bf16": Asked(
        name="schedule_free_adamw", precision=Precision.BF16, words="would round", remedy="bf16-autocast"
    ),
    "without its package": Asked(
        name="stable_adamw", is_run_here=True, words="needs torch-optimi", remedy="pip install torch-optimi"
    ),
}


@pytest.mark.parametrize("case", ASKED.values(), ids=ASKED)
def test_what_would_not_do_what_is_asked_is_refused(case: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=case.words) as error:
        require_optimizer(
            case.name,
            method=Method.FULL,
            on_gpu=case.on_gpu,
            precision=case.precision,
            largest_decay=case.largest_decay,
            is_run_here=case.is_run_here,
        )
    assert case.remedy in error.value.remedy


def test_every_remedy_is_an_optimizer_that_can_be_asked_for() -> None:
    for row in OPTIMIZERS.values():
        assert bool(row.refused) == bool(row.nearest) == (row.state is None), row.name
        if row.pages:
            with pytest.raises(UserError) as error:
                require_optimizer(row.name, method=Method.FULL, on_gpu=False, precision=Precision.FP32)
            find_optimizer(error.value.remedy.removeprefix("Use --optimizer ").rstrip("."))


def test_the_listing_has_every_one_that_can_be_asked_for() -> None:
    lines = listing().splitlines()[1:]
    assert [line.split()[0] for line in lines] == [row.name for row in optimizers.proven()]
    assert any(
        line.split() == ["paged_lion_8bit", "1.02", "bitsandbytes", "and", "a", "GPU"] for line in lines
    )


@pytest.mark.parametrize("given", ["lomo", "adamw_torch, lomo", ["sgd", "no_such"]])
def test_a_search_space_takes_none_that_is_refused(given: object) -> None:
    with pytest.raises(UserError, match=r"lomo is refused|no_such: not an optimizer"):
        parse_dimension("optimizer", given)
