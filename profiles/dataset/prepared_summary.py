"""Describe prepared data for users: format, counts, tokens, and what is cut or left out."""

from __future__ import annotations

from collections.abc import Sequence

from autosft.profiles.dataset.prepared import PreparedData, truncation_report

#: The line before the remarks in what `describe` returns.
REMARKS = "remarks:"


def describe(prepared: PreparedData, seq_lens: Sequence[int] = ()) -> list[str]:
    """Return lines on prepared data: format, counts, tokens, what each length cuts, what was left out."""
    train = prepared.train
    lines = [
        *_source_lines(prepared),
        f"{train.num_examples:,} examples to train on, {prepared.eval.num_examples:,} to evaluate on, "
        f"{prepared.final.num_examples:,} kept for the final score"
        + (f" (evaluation from {prepared.eval_source})" if prepared.eval_source else ""),
        f"training examples: {train.num_turns:,} turns, {train.num_tokens:,} tokens, "
        f"{train.num_scored:,} of them scored ({train.num_scored / max(1, train.num_tokens):.0%})",
        f"tokens an example: median {train.median_length:,}, 95th percentile {train.p95_length:,}, "
        f"longest {train.longest:,}",
    ]
    for cut in truncation_report(prepared, seq_lens) if seq_lens else ():
        lines.append(
            f"length {cut.seq_len:,} cuts {cut.truncated_share:.1%} of the examples "
            f"and {cut.lost_scored_share:.1%} of the scored tokens"
        )
        if cut.num_unscored:
            lines.append(f"left out, no scored token within {cut.seq_len:,}: {cut.num_unscored:,}")
    lines += [
        f"at most {cut.max_rounds} round{'s' if cut.max_rounds > 1 else ''} cuts {cut.cut_share:.1%} of the "
        f"conversations and {cut.lost_scored_share:.1%} of the scored tokens"
        for cut in prepared.rounds
    ]
    if prepared.num_duplicates_removed:
        lines.append(f"left out of training, also evaluated on: {prepared.num_duplicates_removed:,}")
    if prepared.num_capped:
        lines.append(f"cut at the model's longest position: {prepared.num_capped:,}")
    lines += [f"left out, {reason}: {count:,}" for reason, count in prepared.skipped]
    if prepared.notes:
        lines += [REMARKS, *(f"  {note}" for note in prepared.notes)]
    return lines


def _source_lines(prepared: PreparedData) -> list[str]:
    """Return the format of the source, or for each source its format and share of the training data."""
    if len(prepared.sources) < 2:
        weight = prepared.sources[0].weight if prepared.sources else 1.0
        return [f"{prepared.source}: {prepared.format.label}{_use(weight)}"]
    num_examples = max(1, sum(share.num_examples for share in prepared.sources))
    num_scored = max(1, sum(share.num_scored for share in prepared.sources))
    return [f"{len(prepared.sources)} sources, with their shares of the training examples"] + [
        f"  {share.name}: {share.format.label}{_use(share.weight)}, {share.num_examples:,} examples "
        f"({share.num_examples / num_examples:.0%}), {share.num_tokens:,} tokens, "
        f"{share.num_scored:,} of them scored ({share.num_scored / num_scored:.0%} of all scored)"
        for share in prepared.sources
    ]


def _use(weight: float) -> str:
    if weight == 1.0:
        return ""
    return f", {weight:.0%} of it used" if weight < 1.0 else f", each used {weight:g} times"
