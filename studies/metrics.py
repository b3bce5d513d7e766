"""The metrics that trials are compared by, one row each.

`autosft tune --metric`, `--final-metric` and `--target`, `autosft evaluate --metric`, the sampler, pruning,
summaries, reports, notifications and exports take a metric's name, direction, value and interval from its
row.  To add a metric of the evaluation examples, add a row.  A metric with another kind of evidence also
needs code that gathers that evidence during a trial.
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
    """What an evaluation records per example, in the order of the data.

    loss_sums[i]    sum of the loss over the scored tokens of example i, in nats
    num_tokens[i]   number of scored tokens; 0 if truncation left none
    num_correct[i]  number of scored tokens that were the model's first choice; empty in files of old versions
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
    # exp overflows a float above 709 nats; the perplexity of such a model is infinite for all purposes
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
    """A metric: its name, its direction, and how it is computed.

    A metric of tokens is `transform`(sum of `sums` over the examples / number of scored tokens).  `transform`
    is increasing; `sums` returns one number per example, or nothing if the evaluation did not record them.
    """

    name: str  # in flags, files, the database and reports
    direction: Direction
    summary: str  # one line of help
    evidence: Evidence = Evidence.TOKENS
    sums: Callable[[TokenSums], Sequence[float]] | None = None
    transform: Callable[[float], float] = _same
    follows_loss: bool = (
        False  # ranks models as their loss does, so a gain's certainty follows from paired losses
    )
    aliases: tuple[str, ...] = ()  # names in earlier versions
    benchmark: Benchmark | None = None  # of a metric of prompts

    @property
    def minimize(self) -> bool:
        """Whether lower values are better."""
        return self.direction is Direction.MINIMIZE

    @property
    def data_setting(self) -> str:
        """Return the setting of a request that names the prompts, for example "ifeval_data"."""
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
        """Return the name under which the number of prompts asked is reported, next to the metric."""
        return f"{self.name}_prompts"

    def value(self, evaluation: TokenSums) -> float:
        """Return the metric of an evaluation.  Only for metrics of tokens."""
        assert self.sums is not None
        return self.transform(math.fsum(self.sums(evaluation)) / sum(evaluation.num_tokens))

    def interval(self, evaluation: TokenSums) -> Interval | None:
        """Return the metric of an evaluation with its interval; None if its sums were not recorded.

        The ends are transformed like the value, so the interval of a perplexity is slightly asymmetric.
        """
        sums = () if self.sums is None else self.sums(evaluation)
        return ratio(sums, evaluation.num_tokens).mapped(self.transform) if sums else None

    def share_interval(self, value: float, num_prompts: int) -> Interval | None:
        """Return the interval of a share of `num_prompts` prompts; None if there were none."""
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
            summary="mean loss in nats per scored token",
            sums=lambda evaluation: evaluation.loss_sums,
            follows_loss=True,
        ),
        Metric(
            name="eval_perplexity",
            direction=Direction.MINIMIZE,
            summary="exponential of that loss",
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
    """Return the metric with this name, or with this name in an earlier version.

    Raises UserError that lists the known metrics.
    """
    metric = known_metric(name)
    if metric is None:
        raise UserError(f"{flag} {name}: not a metric.", remedy=f"Known: {', '.join(METRICS)}.")
    return metric


def known_metric(name: str) -> Metric | None:
    """Return the metric with this name, or with this name in an earlier version; None if there is none."""
    found = METRICS.get(name)
    return found or next((metric for metric in METRICS.values() if name in metric.aliases), None)


def current_name(name: str) -> str:
    """Return a metric's current name; other names, such as lm-eval tasks, are returned unchanged."""
    metric = known_metric(name)
    return name if metric is None else metric.name


def prompt_metric(name: str) -> Metric | None:
    """Return the metric with this name if it is one of prompts, else None.  Raises UserError if unknown."""
    metric = find_metric(name)
    return metric if metric.evidence is Evidence.PROMPTS else None


def token_metrics() -> tuple[Metric, ...]:
    """Return the metrics that every evaluation computes."""
    return tuple(metric for metric in METRICS.values() if metric.evidence is Evidence.TOKENS)
