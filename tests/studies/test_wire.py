"""Plain JSON and back: what comes back equals what went in, and nothing else is accepted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.recipe import AdapterSettings, MemoryEstimate, Method
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    Measurement,
    TrainingSettings,
    TrialJob,
    TrialRecord,
)
from autosft.studies.wire import WireError, from_plain, to_plain
from tests.workers import small

# JSON has no surrogates; everything else may stand in a name, a message or a path.
st.register_type_strategy(str, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
TYPES = (TrialJob, Measurement, AttemptEnd, TrialRecord, ExecutionPlan, MemoryEstimate)
VALUES = st.one_of(*map(st.from_type, TYPES))


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # equal, with nan equal to itself and types kept


@given(VALUES)
def test_round_trip_through_standard_json(value: Any) -> None:
    text = json.dumps(to_plain(value), allow_nan=False)
    assert same(from_plain(type(value), json.loads(text)), value)


LORA = {"rank": 8, "alpha": 16.0, "targets": ["q_proj"]}


@pytest.mark.parametrize(
    ("plain", "where"),
    [
        ({**LORA, "rnak": 8}, "unknown field 'rnak'"),
        ({"rank": 8, "alpha": 16.0}, "'targets' is missing"),
        ({**LORA, "rank": 8.0}, "AdapterSettings.rank"),
        ({**LORA, "rank": True}, "AdapterSettings.rank"),
        ({**LORA, "rank": "8"}, "AdapterSettings.rank"),
        ({**LORA, "alpha": None}, "AdapterSettings.alpha"),
        ({**LORA, "targets": ["q_proj", 3]}, "AdapterSettings.targets"),
        (["rank"], "not a mapping"),
    ],
)
def test_refusals_name_the_field(plain: object, where: str) -> None:
    with pytest.raises(WireError, match=where):
        from_plain(AdapterSettings, plain)


def test_defaults_may_be_missing_and_ints_serve_as_floats() -> None:
    settings = from_plain(AdapterSettings, {**LORA, "alpha": 16})
    assert settings == AdapterSettings(rank=8, alpha=16.0, targets=("q_proj",))
    assert isinstance(settings.alpha, float)


def test_numbers_that_json_lacks() -> None:
    assert to_plain((math.inf, -math.inf)) == [{"float": "inf"}, {"float": "-inf"}]
    assert math.isnan(from_plain(tuple[float], to_plain((math.nan,)))[0])


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        to_plain({1, 2})


def test_a_renamed_field_keeps_its_released_name() -> None:
    plain = to_plain(replace(small.lora(), method=Method.QLORA))
    assert plain["lora"]["rank"] == 4
    assert "adapter" not in plain
    assert from_plain(TrainingSettings, plain).adapter == small.lora().adapter
    with pytest.raises(WireError, match="the field 'lora' is missing"):
        from_plain(TrainingSettings, {name: value for name, value in plain.items() if name != "lora"})
