"""Presets: what the shipped ones set, that flags win, and where strategies land in another space."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.request import read_request
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.presets import place, preset, presets
from autosft.studies.search.space import SearchSpace, complete
from tests.studies.study_examples import space


def wide(**changes: object) -> SearchSpace:
    """A space that holds everything that the laptop preset asks for."""
    asked = preset("laptop-8gb").request
    names = ("learning_rate", "warmup_ratio", "effective_batch_size", "seq_len", "max_rounds")
    made = {name: parse_dimension(name, asked[name]) for name in names}
    return space().changed(**{**made, **changes})


def test_the_laptop_strategies_are_the_guides_figures() -> None:
    strategies = {strategy.name: dict(strategy.parameters) for strategy in preset("laptop-8gb").strategies}
    assert list(strategies) == ["A", "B", "minimal"]
    a, b, minimal = strategies.values()
    names = ("learning_rate", "effective_batch_size", "seq_len", "max_rounds")
    assert [a[name] for name in names] == [4e-5, 64, 1024, 6]
    assert [b[name] for name in names] == [6e-5, 48, 768, 8]
    assert [minimal[name] for name in names] == [4e-5, 32, 512, 4]
    assert b["weight_decay"] == 0.02
    assert {
        strategy.name: strategy.epochs for strategy in preset("laptop-8gb").strategies if strategy.epochs
    } == {"B": 6}


@pytest.mark.parametrize("name", presets())
def test_every_strategy_lies_in_the_space_of_its_preset(name: str) -> None:
    for strategy in preset(name).strategies:
        parameters, moved = place(strategy, wide())
        assert moved == ()
        assert complete(wide(), parameters).items() >= parameters.items()


def test_a_file_wins_over_a_preset_and_a_flag_over_both(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("preset: laptop-8gb\nepochs: 7\nseq_len: [256, 512]\nevaluations: 3\n")
    request = read_request({"evaluations": 2, "space": {"learning_rate": "1e-4"}}, file)
    assert (request.preset, request.epochs, request.evaluations) == ("laptop-8gb", 7, 2)
    dimensions = {name: str(one) for name, one in request.dimensions().items()}
    assert dimensions["seq_len"] == "256, 512"
    assert dimensions["learning_rate"] == "0.0001"
    assert dimensions["max_rounds"] == "4, 6, 8"  # nobody said otherwise


def test_a_strategys_epochs_give_way_to_the_users() -> None:
    laptop = preset("laptop-8gb")
    a, b, _ = laptop.strategies
    assert [laptop.epochs_of(item, 5.0) for item in (a, b)] == [5.0, 6]
    assert [laptop.epochs_of(item, 2.0) for item in (a, b)] == [2.0, 2.0]


def test_without_a_preset_nothing_is_set() -> None:
    assert read_request({}, None).dimensions() == {}


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError) as error:
        read_request({"preset": "laptop-9gb"}, None)
    assert "laptop-8gb" in str(error.value.remedy)


def test_what_the_user_asked_for_stays_and_is_reported() -> None:
    strategy_a = preset("laptop-8gb").strategies[0]
    fixed = wide(
        learning_rate=parse_dimension("learning_rate", 1e-4), seq_len=parse_dimension("seq_len", [256, 512])
    )
    parameters, moved = place(strategy_a, fixed)
    assert "learning_rate" not in parameters  # fixed: no trial varies it
    assert parameters["seq_len"] == 512
    assert moved == ("learning_rate 0.0001 instead of 4e-05", "seq_len 512 instead of 1024")


def test_a_target_is_of_the_studys_metric() -> None:
    assert read_request({"metric": "ifeval", "target": "ifeval=0.25"}, None).target_value() == 0.25
    for target, words in (("ifeval=0.25", "compares trials by eval_loss"), ("eval_loss=low", "not a number")):
        with pytest.raises(UserError, match=words):
            read_request({"target": target}, None)
