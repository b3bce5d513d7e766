"""What a new study takes over from earlier ones, and from which."""

from __future__ import annotations

from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method
from autosft.studies.search.dimensions import Fixed
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.space import default_space
from autosft.studies.store.records import Records, open_records
from autosft.studies.trial import TrialState
from autosft.studies.warm_start import LIKENESS as HOW_ALIKE
from autosft.studies.warm_start import NOTHING, earlier_studies, warm_start
from tests.studies.study_examples import end, evaluation, opened, space, spec, start

LLAMA = {"model": {"architecture": "LlamaForCausalLM", "num_parameters": 1_000}}


def finished(records: Records, name: str, losses: tuple[float, ...], **changes: Any) -> None:
    study = opened(records, name=name, **changes)
    for number, loss in enumerate(losses):
        study.ask(now=1.0)
        start(study, number)
        study.record(evaluation(number, 1, 1, loss), now=1.0)
        study.end_attempt(end(number, 1), TrialState.COMPLETED, now=1.0)
    study.release(now=2.0)


@pytest.fixture
def records(sqlite_url: str):
    opened_ = open_records(sqlite_url)
    yield opened_
    opened_.close()


OTHER_MODEL = {"model_fingerprint": "x" * 64}
LORA = space().changed(method=Fixed(value="lora"))
LIKENESS: dict[str, tuple[dict[str, Any], str | None]] = {
    "same model, same data": ({}, "the same model, the same data"),
    "same model, other data": ({"data_fingerprint": "y" * 64}, "the same model, other data"),
    "like model": (
        {**OTHER_MODEL, "environment": {"model": {**LLAMA["model"], "num_parameters": 1_900}}},
        "a model of the same architecture and size, the same data",
    ),
    "larger model": (
        {**OTHER_MODEL, "environment": {"model": {**LLAMA["model"], "num_parameters": 9_000}}},
        None,
    ),
    "other architecture": (
        {**OTHER_MODEL, "environment": {"model": {**LLAMA["model"], "architecture": "Other"}}},
        None,
    ),
    "unknown model": ({**OTHER_MODEL, "environment": {}}, None),
    "other metric": ({"metric": "eval_perplexity"}, None),
    "other method": ({"space": LORA}, None),
}


@pytest.mark.parametrize("case", LIKENESS)
def test_only_like_studies_are_taken_over_by_themselves(case: str, records: Records) -> None:
    changes, why = LIKENESS[case]
    new = spec("new", environment=LLAMA, **({"metric": "eval_loss"} if case == "other metric" else {}))
    earlier = spec("earlier", **{"environment": LLAMA, **changes})
    if case == "other metric":
        records.open_study(earlier, now=0.0)
        assert warm_start(records, new, "auto") == NOTHING
        return
    finished(records, "earlier", (2.0, 1.0, 1.5), **{"environment": LLAMA, **changes})
    found = warm_start(records, new, "auto")
    if why is None:
        assert found == NOTHING
        return
    tried = [dict(trial.parameters) for trial in records.read_study("earlier").trials()]
    assert list(found.trials) == [tried[1], tried[2]]
    assert f"study earlier ({why})" in found.lines[0]


def test_the_nearest_study_wins_and_a_named_one_over_it(records: Records) -> None:
    finished(records, "near", (2.0,))
    finished(records, "far", (1.0,), data_fingerprint="y" * 64)
    assert "study near" in warm_start(records, spec("new"), "auto").lines[0]
    assert "study far (as asked)" in warm_start(records, spec("new"), "far").lines[0]
    assert warm_start(records, spec("new"), "none") == NOTHING
    with pytest.raises(UserError, match="no study named 'fra'"):
        warm_start(records, spec("new"), "fra")


def test_a_study_that_is_resumed_takes_nothing_over(records: Records) -> None:
    finished(records, "near", (2.0,))
    finished(records, "mine", (2.0,))
    assert warm_start(records, spec("mine"), "auto") == NOTHING


def test_a_search_learns_from_like_studies_the_most_alike_first(records: Records) -> None:
    finished(records, "near", (2.0, 1.5))
    finished(records, "other data", (1.0,), data_fingerprint="y" * 64)
    finished(records, "other model", (1.0,), **OTHER_MODEL)
    found = earlier_studies(records, spec("new"), "auto")
    assert [(study.name, study.likeness) for study in found] == [
        ("near", HOW_ALIKE[0]),
        ("other data", HOW_ALIKE[1]),
    ]
    assert [trial.value for trial in found[0].trials] == [2.0, 1.5]
    assert earlier_studies(records, spec("new"), "none") == ()
    [asked] = earlier_studies(records, spec("new"), "other model")
    assert (asked.name, asked.likeness) == ("other model", HOW_ALIKE[-1])


def test_what_ended_after_a_study_began_is_not_learned_from(records: Records) -> None:
    """A study that is resumed decides as it did: what it learns from does not change meanwhile."""
    records.open_study(spec("mine"), now=0.5).release(now=0.5)
    finished(records, "beside it", (2.0,))
    assert earlier_studies(records, spec("mine"), "auto") == ()
    assert earlier_studies(records, spec("new"), "auto")


def test_settings_outside_the_new_space_are_moved_and_that_is_reported(records: Records) -> None:
    finished(records, "earlier", (2.0,))
    [trial] = records.read_study("earlier").trials()
    narrow = default_space(
        method=Method.FULL,
        num_parameters=135_000_000,
        num_train_examples=10_000,
        seq_lens=[128],
        effective_batch_sizes=[8, 16, 32, 64, 128],
        overrides={"learning_rate": parse_dimension("learning_rate", "1..2")},
    )
    found = warm_start(records, spec("new", space=narrow), "auto")
    assert found.trials[0]["learning_rate"] == 1.0
    before = dict(trial.parameters)["learning_rate"]
    assert f"learning_rate 1.0 instead of {before}" in found.lines[0]
    study = opened(records, name="new", space=narrow)
    assert study.enqueue(found.trials[0], origin="warm start", now=3.0)
    assert study.ask(now=4.0).origin == "warm start"


@pytest.mark.parametrize(
    ("earlier", "taken"),
    [({}, False), ({"data": "other.jsonl"}, True), ({"data_fingerprint": "now"}, True)],
    ids=["another part of the same data", "other data", "the same fold"],
)
def test_a_fold_learns_nothing_from_what_was_chosen_with_its_examples(
    records: Records, earlier: dict[str, Any], taken: bool
) -> None:
    finished(records, "earlier", (2.0,), environment=LLAMA, **earlier)
    now = spec("now", environment=LLAMA, data_fingerprint="now", data_options={"fold": "2/5"})
    assert bool(warm_start(records, now, "auto").trials) is taken
