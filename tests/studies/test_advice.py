"""Watching rules on recorded curves (curves.json, written by real runs of a small model) and made ones."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from autosft.studies.advice import Cause, busy, gradient_norm, loss_not_falling, memory_taken, slower, watch
from autosft.studies.trial import Measurement
from tests.studies.curves import curve, measurement

GIB = 1 << 30


def seen(reports: list[Measurement]) -> set[Cause]:
    """Return all that is noticed while the reports come in, one after another."""
    return {advice.cause for end in range(1, len(reports) + 1) for advice in watch(reports[:end])}


RECORDED = [
    ("learns", set()),
    ("too small a learning rate", {Cause.LOSS_NOT_FALLING}),
    ("learned by heart", {Cause.OVERFITTING}),
]


@pytest.mark.parametrize(("name", "causes"), RECORDED, ids=[item[0] for item in RECORDED])
def test_recorded_curves(name: str, causes: set[Cause]) -> None:
    assert seen(curve(name)) == causes


def test_a_line_says_what_is_seen_and_what_to_do() -> None:
    [advice] = [
        item for item in watch(curve("too small a learning rate")) if item.cause is Cause.LOSS_NOT_FALLING
    ]
    assert (advice.trial, advice.step) == (3, 80)
    assert "not falling: 3.4" in advice.message
    assert "learning rate" in advice.message
    assert "\n" not in advice.message


def losses(*values: float) -> list[Measurement]:
    return [measurement(step=step, loss=value) for step, value in enumerate(values, 1)]


def noisy(*values: float, noise: float, seed: int = 0) -> list[Measurement]:
    """Return the losses with normal noise of a standard deviation relative to each."""
    random = Random(seed)
    return losses(*[value * (1 + random.gauss(0, noise)) for value in values])


def line(before: float, after: float, *, num_steps: int) -> list[float]:
    return [before + (after - before) * at / (num_steps - 1) for at in range(num_steps)]


SPIKE = line(7.6, 6.6, num_steps=40)
SPIKE[36] = 30.0

#: Curves and whether "not falling" is said at some step of them.
TRENDS = [
    ("flat, too few reports", losses(*[1.7] * 14), False),
    ("flat, a fifth of the run", losses(*[1.7] * 20), False),
    ("flat", losses(*[1.7] * 40), True),
    ("rises", losses(*line(1.7, 1.9, num_steps=40)), True),
    ("falls by a hundredth", losses(*line(1.7, 1.683, num_steps=100)), True),
    ("falls by a quarter", losses(*line(1.7, 1.3, num_steps=40)), False),
    ("falls with a spike among the last", losses(*SPIKE), False),
    ("falls by a quarter in noise of a quarter", noisy(*line(1.08, 0.83, num_steps=100), noise=0.25), False),
    ("falls by a twentieth in noise of a tenth", noisy(*line(1.7, 1.6, num_steps=100), noise=0.1), False),
    ("flat in noise that could hide a fall", noisy(*[1.7] * 50, noise=0.3), False),
    ("flat in little noise", noisy(*[1.7] * 60, noise=0.05), True),
    ("flat in noise, long enough to tell", noisy(*[1.7] * 1000, noise=0.3), True),
    ("fell at once, flat since", losses(3.4, 3.2, 2.9, *[1.7] * 60), False),
]


@pytest.mark.parametrize(("name", "reports", "said"), TRENDS, ids=[trend[0] for trend in TRENDS])
def test_not_falling_is_said_only_of_what_does_not_fall(
    name: str, reports: list[Measurement], said: bool
) -> None:
    assert (Cause.LOSS_NOT_FALLING in seen(reports)) is said


#: How often it may be said, of 60 seeds, of a run that falls; and must be, of one that does not.
RATES = [
    ("a quarter in noise of a quarter", line(1.08, 0.83, num_steps=100), 0.25, (0, 3)),
    ("a quarter in noise of a tenth", line(1.7, 1.3, num_steps=100), 0.1, (0, 3)),
    ("an eighth in noise of a thirtieth", line(1.7, 1.49, num_steps=100), 0.03, (0, 3)),
    ("flat in noise of a twentieth", [1.7] * 100, 0.05, (50, 60)),
]


@pytest.mark.parametrize(("name", "values", "noise", "bounds"), RATES, ids=[rate[0] for rate in RATES])
def test_how_often_noise_misleads(
    name: str, values: list[float], noise: float, bounds: tuple[int, int]
) -> None:
    num_said = 0
    for seed in range(60):
        reports = noisy(*values, noise=noise, seed=seed)
        num_said += any(loss_not_falling(reports[:end]) for end in range(15, len(reports) + 1, 3))
    assert bounds[0] <= num_said <= bounds[1]


SLOWDOWNS = [
    ("a free machine", [1.0, 1.1, 1.0, 1.2], ""),
    ("a moment", [1.0, 9.0, 1.0, 1.0], ""),
    ("too early", [5.0, 5.0], ""),
    ("busy", [1.0, 4.0, 5.0, 4.0], "4 times as long"),
    ("a GPU", [None] * 5, ""),
]


@pytest.mark.parametrize(("name", "values", "words"), SLOWDOWNS, ids=[item[0] for item in SLOWDOWNS])
def test_a_busy_machine_is_told_by_the_processor_time_of_steps(
    name: str, values: list[float | None], words: str
) -> None:
    said = busy([measurement(step=step, slowdown=value) for step, value in enumerate(values, 1)])
    assert words in said
    assert bool(said) == bool(words)


def norms(*values: float) -> list[Measurement]:
    return [measurement(step=step, grad_norm=value) for step, value in enumerate(values, 1)]


NORMS = [
    ("the guide's range", [0.7 + 0.01 * at for at in range(30)], ""),
    ("one spike is no trend", [0.8] * 20 + [20.0, 0.8, 0.8], ""),
    ("about to diverge", [0.8] * 20 + [20.0, 30.0, 60.0], "diverge"),
    ("nothing left to learn", [0.8] * 20 + [0.01] * 3, "nothing more is learned"),
    ("always clipped", [30.0] * 20, "clipped"),
    ("not a number", [0.8, float("nan")], "not finite"),
]


@pytest.mark.parametrize(("name", "values", "words"), NORMS, ids=[norm[0] for norm in NORMS])
def test_gradient_norms(name: str, values: list[float], words: str) -> None:
    said = gradient_norm(norms(*values))
    assert words in said
    assert bool(said) == bool(words)


def paced(*step_s: float, **last: Any) -> list[Measurement]:
    reports, elapsed_s = [], 0.0
    for step, seconds in enumerate(step_s, 1):
        elapsed_s += seconds
        reports.append(measurement(step=step, num_tokens=1000 * step, elapsed_s=elapsed_s))
    return [*reports[:-1], replace(reports[-1], **last)]


PACES = [
    ("steady", paced(*[1.0] * 30, temperature_c=85.0), ""),
    ("one slow step", paced(*[1.0] * 20, 9.0, *[1.0] * 3), ""),
    ("another trial starts beside it", paced(*[0.1] * 200, *[0.3] * 8), ""),
    ("hot", paced(*[1.0] * 20, *[1.5] * 6, temperature_c=88.0), "at 88 °C: let air in"),
    ("throttled", paced(*[1.0] * 20, *[1.5] * 6, throttle_reasons=("too hot (driver)",)), "too hot"),
    ("no reason known", paced(*[1.0] * 20, *[1.5] * 6), "Something else"),
]


@pytest.mark.parametrize(("name", "reports", "words"), PACES, ids=[pace[0] for pace in PACES])
def test_paces(name: str, reports: list[Measurement], words: str) -> None:
    said = slower(reports)
    assert words in said
    assert bool(said) == bool(words)


def test_the_time_of_an_evaluation_slows_nothing() -> None:
    reports = paced(*[1.0] * 24)
    evaluated = [
        each
        for at, one in enumerate(reports)
        for each in (
            replace(one, elapsed_s=one.elapsed_s + 50.0 * (at // 4)),
            # The evaluation's own report comes when it is over.
            *(
                [replace(one, evaluation=at // 4 + 1, elapsed_s=one.elapsed_s + 50.0 * (at // 4 + 1))]
                if at % 4 == 3
                else []
            ),
        )
    ]
    assert slower(evaluated) == ""


def test_memory_that_others_take() -> None:
    def said(free_gib: float, promised_gib: float = 4) -> str:
        return memory_taken(
            free_before_bytes=8 * GIB,
            promised_bytes=int(promised_gib * GIB),
            free_bytes=int(free_gib * GIB),
            holders="browser",
        )

    assert said(4.0) == ""  # what our trials may take is no news
    assert said(3.8) == ""
    assert "taken 1.0 GiB of the device's memory (browser)" in said(3.0)
