"""LoRA studies with the learning rates of an earlier version keep them when they are resumed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.profiles.recipe import Method
from autosft.scheduler.setup.recorded_rates import recorded_rates, with_dimensions
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Fixed
from autosft.studies.search.space import SearchSpace, default_space, earlier_learning_rates
from autosft.studies.store.records import open_records
from tests.studies.study_examples import spec

NUM_PARAMETERS = 135_000_000
EARLIER = earlier_learning_rates(num_parameters=NUM_PARAMETERS)


def lora_space(**changes: Any) -> SearchSpace:
    made = default_space(
        method=Method.LORA,
        num_parameters=NUM_PARAMETERS,
        num_train_examples=10_000,
        seq_lens=[128],
        effective_batch_sizes=[8, 16],
    )
    return made.changed(**changes)


def found(url: str, space: SearchSpace, *, name: str | None = "study", **given: Any) -> TuneRequest | None:
    request = TuneRequest(model="m", data="d", study=name, storage=url, space=given)
    facts: Any = SimpleNamespace(model=SimpleNamespace(num_parameters=NUM_PARAMETERS))
    design: Any = SimpleNamespace(basis=SimpleNamespace(space=space))
    notes: list[object] = []
    made = recorded_rates(request, facts, design, notes.append)
    assert bool(notes) == bool(made), "it is said"
    return with_dimensions(request, made) if made else None


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


def test_the_rates_of_before_were_ten_times_those_of_full_fine_tuning() -> None:
    assert (EARLIER.low, EARLIER.default, EARLIER.high) == (1.4e-4, 1.4e-3, 1.4e-2)
    assert lora_space()["learning_rate"] != EARLIER


def test_a_study_with_the_rates_of_before_keeps_them(url: str) -> None:
    with closing(open_records(url)) as records:
        records.open_study(spec(space=lora_space(learning_rate=EARLIER)), now=0.0)
    request = found(url, lora_space())
    assert request is not None
    assert request.dimensions()["learning_rate"] == EARLIER


@pytest.mark.parametrize(
    ("space", "stored", "given"),
    [
        (lora_space(), None, {}),
        (lora_space(), lora_space(), {}),
        (lora_space(), lora_space(learning_rate=Fixed(value=1e-3)), {}),
        (lora_space(), lora_space(learning_rate=EARLIER), {"learning_rate": "1e-4"}),
        (lora_space(method=Fixed(value="full")), lora_space(learning_rate=EARLIER), {}),
    ],
    ids=["no study", "a study of now", "rates that the user chose", "rates that are asked for", "full"],
)
def test_every_other_study_has_the_rates_of_now(
    url: str, space: SearchSpace, stored: SearchSpace | None, given: dict[str, str]
) -> None:
    if stored is not None:
        with closing(open_records(url)) as records:
            records.open_study(spec(space=stored), now=0.0)
    assert found(url, space, **given) is None
