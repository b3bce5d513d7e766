"""The metrics that trials are compared by: one row each, read by everything that names a metric.

`autosft tune --metric`, `--final-metric` and `--target`, `autosft evaluate --metric`, the sampler, pruning,
summaries, reports, notifications and exports take a metric's name, direction, value and interval from its
row.  A metric of the evaluation examples is one row more here; one of another kind of evidence also needs
whatever gathers that evidence in a trial.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from autosft.profiles.errors import UserError
from autosft.studies.intervals import Interval, proportion, ratio
from autosft.studies.values import Direction


class TokenSums(Protocol):
    """What an evaluation keeps of each example, in the order of the data.

    loss_sums[i]    nats over the scored tokens of example i
    num_tokens[i]   how many they are; 0 where truncation left none
    num_correct[i]  how many were the model's first choice; empty in files of older versions
    """

    @property
    def loss_sums(self) -> Sequence[float]: ...
    @property
    def num_tokens(self) -> Sequence[int]: ...
    @property
    def num_correct(self) -> Sequence[int]: ...


class Evidence(enum.Enum):
    """What a metric is computed from."""

    TOKENS = "tokens"  #: sums over the scored tokens of each evaluation example
    PROMPTS = "prompts"  #: which prompts a model followed, each answered in full


def _same(value: float) -> float:
    return value


def _exp(power: float) -> float:
    # exp overflows a float above 709 nats; such a model is broken, not infinitely precise
    return math.exp(power) if power < 700 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """The prompts that a metric of prompts is computed from, unless the user gives others."""

    title: str  # as people call it
    hub_name: str  # data set on the hub
    max_new_tokens: int  # of an answer
    extra: str  # optional dependencies that checking answers needs: pip install autosft[extra]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric: what it is called everywhere, which values are better, and how it is computed.

    A metric of tokens is `transform`(sum of `sums` over the examples / number of scored tokens); `transform`
    is increasing, and `sums` gives one number an example, none where the evaluation did not keep them.
    """

    name: str  # in flags, files, the database and reports
    direction: Direction
    summary: str  # one line of help
    evidence: Evidence = Evidence.TOKENS
    sums: Callable[[TokenSums], Sequence[float]] | None = None
    transform: Callable[[float], float] = _same
    follows_loss: bool = False  # orders models as their loss does: paired losses say how certain a gain is
    aliases: tuple[str, ...] = ()  # what earlier versions called it
    benchmark: Benchmark | None = None  # of a metric of prompts

    @property
    def minimize(self) -> bool:
        """Whether lower values are better."""
        return self.direction is Direction.MINIMIZE

    @property
    def data_setting(self) -> str:
        """Return the setting of a request that names the prompts: "ifeval_data" of ifeval."""
        return f"{self.name}_data"

    @property
    def data_flag(self) -> str:
        return "--" + self.data_setting.replace("_", "-")

    @property
    def length_setting(self) -> str:
        """Return the setting of a request that limits the length of answers, in tokens."""
        return f"{self.name}_new_tokens"

    @property
    def count_name(self) -> str:
        """Return the name under which the number of prompts asked is reported along with the metric."""
        return f"{self.name}_prompts"

    def value(self, evaluation: TokenSums) -> float:
        """Return the metric of an evaluation.  For metrics of tokens."""
        assert self.sums is not None
        return self.transform(math.fsum(self.sums(evaluation)) / sum(evaluation.num_tokens))

    def interval(self, evaluation: TokenSums) -> Interval | None:
        """Return the metric of an evaluation with its interval; None where its sums were not kept.

        The ends are transformed with the value, so that a perplexity is not quite in the middle of its own.
        """
        sums = () if self.sums is None else self.sums(evaluation)
        return ratio(sums, evaluation.num_tokens).mapped(self.transform) if sums else None

    def share_interval(self, value: float, num_prompts: int) -> Interval | None:
        """Return the interval of a share of so many prompts; None where none was asked."""
        assert self.evidence is Evidence.PROMPTS
        return proportion(round(value * num_prompts), num_prompts) if num_prompts else None


def _rows(rows: Iterable[Metric]) -> dict[str, Metric]:
    return {row.name: row for row in rows}


#: The name that `autosft.workers.scoring.ifeval` reports its scores under.
IFEVAL = "ifeval"

#: Zhou et al. 2023; the length of answers is that of lm-eval's task.
IFEVAL_BENCHMARK = Benchmark(title="IFEval", hub_name="google/IFEval", max_new_tokens=1280, extra="eval")

#: Every metric by its name.
METRICS: dict[str, Metric] = _rows(
    (
        Metric(
            name="eval_loss",
            direction=Direction.MINIMIZE,
            summary="mean loss in nats a scored token",
            sums=lambda evaluation: evaluation.loss_sums,
            follows_loss=True,
        ),
        Metric(
            name="eval_perplexity",
            direction=Direction.MINIMIZE,
            summary="exp of that loss",
            sums=lambda evaluation: evaluation.loss_sums,
            transform=_exp,
            follows_loss=True,
            aliases=("perplexity",),  # of `autosft evaluate`
        ),
        Metric(
            name="eval_token_accuracy",
            direction=Direction.MAXIMIZE,
            summary="share of scored tokens that are the model's first choice",
            sums=lambda evaluation: evaluation.num_correct,
        ),
        Metric(
            name=IFEVAL,
            direction=Direction.MAXIMIZE,
            summary="share of IFEval's prompts followed in all instructions, strictly (lm-eval)",
            evidence=Evidence.PROMPTS,
            benchmark=IFEVAL_BENCHMARK,
        ),
    )
)


def find_metric(name: str, *, flag: str = "--metric") -> Metric:
    """Return the metric of a name or of one that an earlier version used.

    Raises UserError that names the known metrics.
    """
    metric = known_metric(name)
    if metric is None:
        raise UserError(f"{flag} {name}: not a metric.", remedy=f"Known: {', '.join(METRICS)}.")
    return metric


def known_metric(name: str) -> Metric | None:
    """Return the metric of a name or of one that an earlier version used, None where there is none."""
    found = METRICS.get(name)
    return found or next((metric for metric in METRICS.values() if name in metric.aliases), None)


def current_name(name: str) -> str:
    """Return what a metric is called today; a name that is no metric of ours, a task's say, as it is."""
    metric = known_metric(name)
    return name if metric is None else metric.name


def prompt_metric(name: str) -> Metric | None:
    """Return the metric of a name if it is one of prompts, else None.  Raises UserError for no metric."""
    metric = find_metric(name)
    return metric if metric.evidence is Evidence.PROMPTS else None


def token_metrics() -> tuple[Metric, ...]:
    """Return the metrics that every evaluation measures."""
    return tuple(metric for metric in METRICS.values() if metric.evidence is Evidence.TOKENS)
