"""Search spaces: what users write, what is clipped, where the search starts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import AdapterSettings, Method
from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import (
    FixedSettings,
    SearchSpace,
    active,
    complete,
    default_parameters,
    default_space,
    neighbours,
    rounds_of,
    rule_learning_rate,
    settings_from,
)
from autosft.studies.wire import WireError, from_plain, to_plain
from tests.studies.study_examples import space

WRITTEN: dict[str, tuple[str, object, Dimension]] = {
    "number": ("learning_rate", 3e-4, Fixed(value=3e-4)),
    "number that YAML reads as text": ("learning_rate", "3e-4", Fixed(value=3e-4)),
    "log range": ("learning_rate", "1e-5..1e-3 log", Range(low=1e-5, high=1e-3, log=True)),
    "range with spaces": ("weight_decay", " 0 .. 0.1 ", Range(low=0.0, high=0.1)),
    "range with a step": ("warmup_ratio", "0..0.3 step 0.05", Range(low=0.0, high=0.3, step=0.05)),
    "whole numbers": ("lora_rank", "4..64", Range(low=4, high=64, step=1.0)),
    "whole numbers, log": ("lora_rank", "4..64 log", Range(low=4, high=64, log=True)),
    "a range of one": ("weight_decay", "0.1..0.1", Fixed(value=0.1)),
    "list": ("effective_batch_size", [16, 32], Choices(values=(16, 32))),
    "list on the command line": ("effective_batch_size", "16, 32", Choices(values=(16, 32))),
    "list of one": ("effective_batch_size", [16], Fixed(value=16)),
    "twice the same": ("effective_batch_size", [16, "16", 16.0], Fixed(value=16)),
    "choices with zero": ("weight_decay", "0, 1", Choices(values=(0.0, 1.0))),
    "choices from zero": ("weight_decay", "0,0.1", Choices(values=(0.0, 0.1))),
    "rounds": ("max_rounds", "4, 6", Choices(values=(4, 6))),
    "text": ("lr_scheduler", "cosine", Fixed(value="cosine")),
    "texts": ("lr_scheduler", "cosine, linear", Choices(values=("cosine", "linear"))),
    "LoRA targets": ("lora_targets", "q_proj,v_proj", Fixed(value="q_proj,v_proj")),
    "choices of LoRA targets": (
        "lora_targets",
        ["all-linear", ["q_proj", "v_proj"]],
        Choices(values=("all-linear", "q_proj,v_proj")),
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_users_write(case: str) -> None:
    name, given_value, expected = WRITTEN[case]
    assert parse_dimension(name, given_value) == expected


WRONG: dict[str, tuple[str, object, str]] = {
    "unknown name": ("learning_rat", 1e-4, "Did you mean learning_rate"),
    "not a number": ("learning_rate", "fast", "'fast' is not a number"),
    "not even text": ("learning_rate", None, "None is not a number"),
    "yes": ("learning_rate", True, "True is not a number"),
    "beyond every float": ("learning_rate", 10**400, "is not a number"),
    "infinite": ("learning_rate", "inf", "not a number"),
    "too large": ("learning_rate", 50, "50 is out of bounds; it has to be from 1e-12 to 10"),
    "negative": ("weight_decay", "-0.1..0.1", "-0.1 is out of bounds"),
    "zero batch": ("effective_batch_size", 0, "0 is out of bounds; it has to be at least 1"),
    "broken batch": ("effective_batch_size", 2.5, "2.5 has to be a whole number"),
    "backwards": ("learning_rate", "1e-3..1e-5 log", "ends below its start"),
    "log from zero": ("weight_decay", "0..0.1 log", "has to start above 0"),
    "log with steps": ("learning_rate", "1e-5..1e-3 log step 1e-5", "is not a range"),
    "half a range": ("learning_rate", "1e-5..", "is not a range"),
    "giant step": ("warmup_ratio", "0..0.1 step 0.5", "step 0.5 does not fit between 0 and 0.1"),
    "range of texts": ("lr_scheduler", "cosine..linear", "takes a list of choices"),
    "unknown scheduler": ("lr_scheduler", "cosinus", "'cosinus' is not known"),
    "unknown method": ("method", "lorra", "One of: full, lora, qlora, sparse"),
    "a comma of thousands": ("seq_len", "2,048", 'Write 2048, or, for choices, "2, 048"'),
    "a decimal comma": ("weight_decay", "0,1", 'Write 0.1, or, for choices, "0, 1"'),
    "a small number with a comma": ("learning_rate", "0,0003", "Write 0.0003"),
    "nothing": ("effective_batch_size", [], "the list of choices is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_users_get_wrong(case: str) -> None:
    name, given_value, said = WRONG[case]
    with pytest.raises(UserError) as raised:
        parse_dimension(name, given_value)
    assert said in str(raised.value)


def test_every_dimension_can_be_stored() -> None:
    made = space(lr_scheduler=Choices(values=("cosine", "linear"), default="linear"), seq_len=Fixed(value=7))
    assert from_plain(SearchSpace, to_plain(made)) == made


def test_a_space_is_stored_as_a_mapping_and_has_what_settings_had_before_they_were_there() -> None:
    made = space()
    plain = to_plain(made)
    assert list(plain) == list(SETTINGS)
    assert plain["optimizer"] == {"value": "adamw_torch_fused"}
    del plain["max_rounds"]  # as studies of an earlier version
    assert from_plain(SearchSpace, plain) == made
    with pytest.raises(WireError, match="unknown setting 'lerning_rate'"):
        from_plain(SearchSpace, {**plain, "lerning_rate": {"value": 1.0}})
    del plain["learning_rate"]
    with pytest.raises(WireError, match="the setting 'learning_rate' is missing"):
        from_plain(SearchSpace, plain)


# The default space


def make(**changes: object) -> SearchSpace:
    wanted = {
        "method": Method.FULL,
        "num_parameters": 7_000_000_000,
        "num_train_examples": 10_000,
        "seq_lens": [1024],
        "effective_batch_sizes": [8, 16, 32, 64, 128],
    }
    return default_space(**{**wanted, **changes})  # type: ignore[arg-type]


def test_the_rule_starts_where_published_runs_do() -> None:
    assert rule_learning_rate(method=Method.FULL, num_parameters=7_000_000_000) == 2e-5
    for num_parameters in (1_000_000, 7_000_000_000, 1_000_000_000_000):  # whatever the size
        assert rule_learning_rate(method=Method.LORA, num_parameters=num_parameters) == 3e-4
        assert rule_learning_rate(method=Method.QLORA, num_parameters=num_parameters) == 3e-4
    assert rule_learning_rate(method=Method.FULL, num_parameters=135_000_000) == 1.4e-4


def test_the_default_is_inside_its_space_and_at_the_rule() -> None:
    for method in (Method.FULL, Method.LORA, Method.QLORA):
        for num_parameters in (1_000_000, 135_000_000, 70_000_000_000):
            made = make(method=method, num_parameters=num_parameters)
            parameters = default_parameters(made)
            assert complete(made, parameters) == parameters
            assert parameters["learning_rate"] == rule_learning_rate(
                method=method, num_parameters=num_parameters
            )
            assert ("lora_rank" in parameters) == (method is not Method.FULL)


@pytest.mark.parametrize(
    ("num_examples", "start"), [(100_000, 64), (6_400, 64), (3_200, 32), (1_000, 8), (10, 8)]
)
def test_small_data_starts_with_a_batch_that_leaves_it_a_hundred_steps(num_examples: int, start: int) -> None:
    assert default_parameters(make(num_train_examples=num_examples))["effective_batch_size"] == start


def test_a_users_range_of_batches_is_narrowed_to_what_the_devices_can_divide() -> None:
    asked = {"effective_batch_size": parse_dimension("effective_batch_size", "10..70")}
    made = make(overrides=asked)
    assert made["effective_batch_size"] == Choices(values=(16, 32, 64), default=64)


def test_a_batch_that_the_devices_cannot_divide_is_refused_not_changed() -> None:
    for asked in (24, [16, 24], "20..30"):
        with pytest.raises(UserError, match="Possible: 8, 16, 32, 64, 128"):
            make(overrides={"effective_batch_size": parse_dimension("effective_batch_size", asked)})


def test_a_users_range_starts_at_its_value_nearest_to_the_rule() -> None:
    asked = {"learning_rate": parse_dimension("learning_rate", "1e-6..1e-5 log")}
    assert default_parameters(make(overrides=asked))["learning_rate"] == 1e-5


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean optimizer"):
        make(overrides={"optimiser": Fixed(value="adamw_torch")})


CLIPS = {
    "choices": (Choices(values=(512, 1024, 2048), default=2048), Choices(values=(512, 1024), default=1024)),
    "range": (Range(low=512, high=2048, step=1.0), Range(low=512, high=1024, step=1.0)),
    "fits": (Fixed(value=1024), Fixed(value=1024)),
    "fixed and too long": (Fixed(value=1025), None),
    "all too long": (Choices(values=(2048, 4096)), None),
    "range too long": (Range(low=2048, high=4096, step=1.0), None),
}


@pytest.mark.parametrize("case", CLIPS)
def test_the_planner_clips_what_does_not_fit(case: str) -> None:
    before, after = CLIPS[case]
    made = make().changed(seq_len=before)
    if after is None:
        with pytest.raises(UserError, match="at most 1024 fits"):
            made.clip(max_seq_len=1024)
    else:
        assert made.clip(max_seq_len=1024)["seq_len"] == after


# Parameters


def test_lora_counts_only_where_it_is_trained() -> None:
    made = make(overrides={"method": parse_dimension("method", "full, lora")})
    assert made.is_conditional
    assert "lora_rank" not in active(made, {"method": "full"})
    assert "lora_rank" in active(made, {"method": "lora"})
    full = settings_from(made, complete(made, {"method": "full"}), FixedSettings(num_train_examples=9))
    lora = settings_from(made, complete(made, {"method": "lora"}), FixedSettings(num_train_examples=9))
    assert full.adapter is None
    assert lora.adapter == AdapterSettings(rank=16, alpha=32.0, targets="all-linear")
    assert not make(method=Method.LORA).is_conditional


def test_settings_are_what_the_parameters_and_the_space_say() -> None:
    made = space(optimizer=Fixed(value="adafactor"), lora_targets=Fixed(value="q_proj, v_proj"))
    settings = settings_from(
        made, {**default_parameters(made), "learning_rate": 5e-4}, FixedSettings(num_train_examples=9, seed=3)
    )
    assert (settings.learning_rate, settings.optimizer, settings.seed, settings.num_train_examples) == (
        5e-4,
        "adafactor",
        3,
        9,
    )


def test_neighbours_try_the_learning_rate_up_and_down() -> None:
    made = make()
    default = default_parameters(made)
    up, down = neighbours(made, default)
    assert up == {**default, "learning_rate": 6e-5}
    assert down == {**default, "learning_rate": 6.7e-6}


def test_neighbours_are_clipped_and_never_the_same_twice() -> None:
    made = space(learning_rate=Range(low=1e-4, high=2e-4, log=True, default=1e-4))
    [only] = neighbours(made, default_parameters(made))
    assert only["learning_rate"] == 2e-4
    fixed = space(learning_rate=Fixed(value=1e-4))
    assert neighbours(fixed, default_parameters(fixed)) == ()


@given(low=st.floats(-10, 10), width=st.floats(1e-3, 10), part=st.floats(1e-3, 1), value=st.floats(-100, 100))
def test_the_nearest_value_is_on_the_grid_and_inside(
    low: float, width: float, part: float, value: float
) -> None:
    dimension = Range(low=low, high=low + width, step=width * part)
    nearest = dimension.nearest(value)
    assert dimension.low <= nearest <= dimension.high + 1e-9
    assert math.isclose(dimension.nearest(nearest), nearest, abs_tol=1e-9)
    assert nearest in dimension
    assert (
        abs(nearest - value) <= max(width * part / 2, abs(value - min(max(value, low), dimension.top))) + 1e-9
    )


def test_rounds_are_searched_only_where_several_are_asked_for() -> None:
    fixed = FixedSettings(num_train_examples=10)
    asked = {"max_rounds": parse_dimension("max_rounds", "2..4")}
    made = default_space(
        method=Method.FULL,
        num_parameters=10**6,
        num_train_examples=1000,
        seq_lens=[64],
        effective_batch_sizes=[8],
        overrides=asked,
    )
    assert made["max_rounds"] == Choices(values=(2, 3, 4), default=4)  # starts with the least cut off
    assert settings_from(made, {**default_parameters(made), "max_rounds": 2}, fixed).max_rounds == 2
    # One number is how the data is prepared, not something that a trial chooses.
    single = made.changed(max_rounds=Fixed(value=3))
    assert "max_rounds" not in single.searched()
    assert settings_from(single, default_parameters(single), fixed).max_rounds is None


def test_too_many_numbers_of_rounds_are_refused() -> None:
    with pytest.raises(UserError, match="prepared once for each"):
        rounds_of(parse_dimension("max_rounds", "1..100"))
