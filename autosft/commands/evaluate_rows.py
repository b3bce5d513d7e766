"""What `autosft evaluate` shows: a row a score, and a paired difference against the first model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from autosft.commands.evaluate_scores import ScoredModel

if TYPE_CHECKING:
    from autosft.studies.results.paired import PairedDifference
    from autosft.workers.scoring.saved_models import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A score of a model, beside the first model's."""

    model: ScoredModel
    score: Score
    difference: PairedDifference | None  # how much better than the first; None of the first itself
    why_none: str = ""  # why another model's score cannot be paired


def rows_of(found: ScoredModel, first: ScoredModel) -> list[Row]:
    """Return a model's rows."""
    rows = []
    for score in found.scores:
        difference = None if found is first else difference_of(score.metric, found, first)
        is_unpaired = found is not first and difference is None
        rows.append(
            Row(
                model=found,
                score=score,
                difference=difference,
                why_none=why_unpaired(score.metric) if is_unpaired else "",
            )
        )
    return rows


def difference_of(metric: str, found: ScoredModel, first: ScoredModel) -> PairedDifference | None:
    """Return how much better a model is than the first by a metric, paired; None where that cannot be."""
    from autosft.studies.metrics import METRICS, Evidence
    from autosft.studies.results.paired import prompts_difference, tokens_difference

    row = METRICS.get(metric)
    if row is None:
        return None
    if row.evidence is Evidence.TOKENS and found.losses is not None and first.losses is not None:
        return tokens_difference(row, found.losses, first.losses)
    if row.evidence is Evidence.PROMPTS and found.passes is not None and first.passes is not None:
        return prompts_difference(row, found.passes, first.passes)
    return None


def why_unpaired(metric: str) -> str:
    """Say why two models' scores cannot be paired; empty for metrics that never are."""
    from autosft.studies.metrics import METRICS, Evidence

    row = METRICS.get(metric)
    if row is None:
        return ""
    if row.evidence is Evidence.PROMPTS:
        return "given up early"
    return "scored on other examples or tokens"


def words_of(difference: PairedDifference) -> str:
    """Return "lower by 0.103 ± 0.059, better"; of a tie, that it is one."""
    is_lower = (difference.gain.value >= 0) == difference.minimize
    by = f"{'lower' if is_lower else 'higher'} by {abs(difference.gain.value):.3g}"
    by += f" ± {difference.gain.half:.2g}"
    by += " nats per token" if difference.is_loss else ""
    if difference.is_tie:
        return f"{by}, no better or worse beyond chance"
    return f"{by}, {'better' if difference.is_better else 'worse'}"


def line_of(row: Row) -> str:
    """Return a score as a line, for what is shown while other models are still to come."""
    from autosft.studies.formatting import format_metric

    text = f"{row.model.ready.name}: {row.score.metric} {format_metric(row.score.value)}"
    if row.score.low is not None and row.score.high is not None:
        text += f" ({format_metric(row.score.low)} to {format_metric(row.score.high)})"
    if row.difference is not None:
        text += f"; against the first: {words_of(row.difference)}"
    return text + (", scored before" if row.model.is_from_before else "")


def as_plain(row: Row) -> dict[str, Any]:
    from autosft.studies.wire import to_plain

    given, record = row.model.ready.model, row.model.ready.model.record
    return {
        "checkpoint": given.source,
        "given": given.given,
        "kind": given.kind.value,
        "study": None if given.study is None else given.study.spec.name,
        "trial": None if record is None else record.trial,
        "step": None if record is None else record.step,
        **to_plain(row.score),
        "over_first": to_plain(row.difference),
        "why_not_paired": row.why_none,
    }


def show(rows: Sequence[Row]) -> None:
    """Print a table of scores, with a column of differences where there are several models."""
    from autosft.studies.formatting import format_metric
    from autosft.ui.tables import new_table, show_table

    has_several = len({row.model.ready.name for row in rows}) > 1
    table = new_table()
    table.add_column("model", overflow="fold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("of", justify="right")
    if has_several:
        table.add_column(f"against {rows[0].model.ready.name}", overflow="fold")
    table.add_column("")
    for row in rows:
        score = row.score
        has_ends = score.low is not None and score.high is not None
        ends = f"{format_metric(score.low)} to {format_metric(score.high)}" if has_ends else ""
        paired = words_of(row.difference) if row.difference is not None else row.why_none
        table.add_row(
            row.model.ready.name,
            score.metric,
            format_metric(score.value),
            ends,
            "" if score.num_examples is None else f"{score.num_examples:,}",
            *([paired] if has_several else []),
            score.note,
        )
    show_table(table)
    if any(row.difference is not None for row in rows):
        typer.echo("Paired: the same examples under both models, so that their common difficulty cancels.")
