"""Whether tuning has beaten the untuned model: paired, by every metric, and said in plain words."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from autosft.studies.files.checkpoints import evaluation_path, prompt_scores_path, trial_dir, untuned_dir
from autosft.studies.metrics import METRICS
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.results.over_untuned import describe_over_untuned, over_untuned
from autosft.studies.results.paired import prompts_difference, tokens_difference
from autosft.studies.trial import TrialRecord, TrialState
from autosft.studies.values import UntunedScore
from tests.studies.report_examples import made_up_report
from tests.studies.study_examples import evaluation

NUM = 200
RNG = random.Random(0)
HARDNESS = [RNG.uniform(2.0, 60.0) for _ in range(NUM)]  # spread widely: intervals of the values overlap
NOISE = [RNG.gauss(0.0, 0.5) for _ in range(NUM)]


def losses(shift: int) -> ExampleLosses:
    """Losses that are lower by `shift` nats an example, whatever makes an example hard."""
    return ExampleLosses(
        step=10,
        loss_sums=tuple(hard - shift + noise for hard, noise in zip(HARDNESS, NOISE, strict=True)),
        num_tokens=(10,) * NUM,
        num_correct=tuple(5 + (shift if i % 3 == 0 else 0) for i in range(NUM)),
    )


BASE = ExampleLosses(step=0, loss_sums=tuple(HARDNESS), num_tokens=(10,) * NUM, num_correct=(5,) * NUM)

CASES = [
    ("clearly better", 1, ""),
    ("no different", 0, "Not better than the untuned model beyond chance: "),
    ("clearly worse", -1, "Worse than the untuned model: "),
]


@pytest.mark.parametrize(("shift", "before"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("metric", ["eval_loss", "eval_perplexity", "eval_token_accuracy"])
def test_every_metric_of_tokens_is_paired_and_said_plainly(
    metric: str, shift: int, before: str, tmp_path: Path
) -> None:
    assert over_untuned(tmp_path, untuned(BASE), None, metric=metric) is None, "there is no trial yet"
    save(evaluation_path(trial_dir(tmp_path, 0), 2), losses(shift))
    save(evaluation_path(untuned_dir(tmp_path), 0), BASE)
    found = over_untuned(tmp_path, untuned(BASE), trial(losses(shift)), metric=metric)
    assert found is not None
    assert found.difference is not None
    words = describe_over_untuned(found)
    assert words.startswith(f"{before}{metric} ")
    assert "of the untuned model" in words
    assert f"95 % interval over {NUM} examples, paired" in words
    if shift and METRICS[metric].follows_loss:
        assert f"loss {'lower' if shift > 0 else 'higher'} by 0.10" in words or "by 0.09" in words
        unpaired = METRICS["eval_loss"].interval(BASE)
        assert unpaired is not None
        assert found.difference.gain.half < unpaired.half / 10
    elif shift:
        assert f"eval_token_accuracy {'higher' if shift > 0 else 'lower'} by 0.0335 ± " in words


def test_prompts_are_paired_too(tmp_path: Path) -> None:
    ours, theirs = [True] * 12 + [False] * 28, [False] * 40
    for path, passes in (
        (prompt_scores_path(trial_dir(tmp_path, 0), 2), ours),
        (prompt_scores_path(untuned_dir(tmp_path), 0), theirs),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"is_raced": False, "strict": [[flag] for flag in passes]}))
    before = UntunedScore(metrics=(("ifeval", 0.0),), duration_s=1, recorded_at=0)
    best = trial(BASE, metrics=(("ifeval", 0.3),))
    words = describe_over_untuned(over_untuned(tmp_path, before, best, metric="ifeval"))
    assert words.startswith("ifeval 0.3000 against 0.0000 of the untuned model, ifeval higher by 0.3 ± ")
    assert "over 40 prompts, paired" in words


PROMPTS = [
    ("nothing differs", [True] * 20, [True] * 20, True),
    ("one prompt gained of 20 is chance", [True] * 20, [True] * 19 + [False], True),
    ("ten gained of 20 is none", [True] * 20, [True] * 10 + [False] * 10, False),
]


@pytest.mark.parametrize(("ours", "theirs", "is_tie"), [c[1:] for c in PROMPTS], ids=[c[0] for c in PROMPTS])
def test_the_interval_of_prompts_has_a_width(ours: list[bool], theirs: list[bool], is_tie: bool) -> None:
    found = prompts_difference(METRICS["ifeval"], ours, theirs)
    assert found is not None
    assert found.is_tie == is_tie
    assert found.gain.half > 0
    back = prompts_difference(METRICS["ifeval"], theirs, ours)
    assert back is not None
    assert (back.gain.low, back.gain.high) == pytest.approx((-found.gain.high, -found.gain.low))


def test_what_cannot_be_paired_is_not(tmp_path: Path) -> None:
    other = dataclasses.replace(BASE, num_tokens=(9,) * NUM)
    assert tokens_difference(METRICS["eval_loss"], BASE, other) is None
    old = dataclasses.replace(BASE, num_correct=())
    assert tokens_difference(METRICS["eval_token_accuracy"], old, BASE) is None
    gone = over_untuned(tmp_path, untuned(BASE), trial(BASE), metric="eval_loss")
    assert "how certain that is cannot be said" in describe_over_untuned(gone)
    assert over_untuned(tmp_path, None, trial(BASE), metric="eval_loss") is None
    assert describe_over_untuned(None) == ""


def save(path: Path, found: ExampleLosses) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(found)))


def values(found: ExampleLosses) -> tuple[tuple[str, float], ...]:
    return tuple((name, row.value(found)) for name, row in METRICS.items() if row.sums is not None)


def untuned(found: ExampleLosses) -> UntunedScore:
    return UntunedScore(metrics=values(found), duration_s=1.0, recorded_at=0.0)


def trial(found: ExampleLosses, *, metrics: Sequence[tuple[str, float]] = ()) -> TrialRecord:
    at = dataclasses.replace(evaluation(0, 1, 2), metrics=tuple(metrics) or values(found))
    record = made_up_report(6).trials[0]
    state = TrialState.COMPLETED
    return dataclasses.replace(record, number=0, state=state, value=1.0, best_step=20, measurements=(at,))
