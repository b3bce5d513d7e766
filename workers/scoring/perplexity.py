"""Compute the perplexity of running text with a sliding window: each token is scored once, in a long context.

In disjoint blocks the first tokens of each block have hardly any context, which makes a model look worse than
it is.  A window that moves by less than its length gives every token but the first ones a context of at least
`window - stride` tokens (transformers' documentation, "Perplexity of fixed-length models").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autosft.workers.scoring.evaluation import Evaluation


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `end` of a text; those from `first_scored` on are scored."""

    start: int
    end: int
    first_scored: int


def windows(num_tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """Yield windows that score each token but the first exactly once.

    Raises ValueError unless 1 <= stride < window.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride {stride} is not between 1 and the window's length {window} less 1.")
    scored = 1
    while scored < num_tokens:
        end = min(num_tokens, scored + (window - 1 if scored == 1 else stride))
        yield Window(max(0, end - window), end, scored)
        scored = end


def score_tokens(
    model: Any,
    token_ids: Sequence[int],
    *,
    window: int,
    stride: int,
    micro_batch: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Score a text given as token ids, with a window where an `Evaluation` has an example.

    `model` carries trl's fused head, so no logits are materialized.
    """
    import torch

    ids = torch.tensor(token_ids, dtype=torch.long)
    every = list(windows(len(ids), window=window, stride=stride))
    losses: list[float] = []
    counts: list[int] = []
    correct: list[int] = []
    model.eval()
    with torch.no_grad():
        for batch in batches(every, micro_batch):
            inputs = torch.stack([ids[part.start : part.end] for part in batch])
            labels = inputs.clone()
            for row, scored in zip(labels, batch, strict=True):
                row[: scored.first_scored - scored.start] = -100
            outputs = model(
                input_ids=inputs.to(model.device),
                labels=labels.to(model.device),
                use_cache=False,
                fused_lm_head=True,
            )
            losses += (-outputs.log_probs.double()).sum(dim=1).tolist()
            counts += [scored.end - scored.first_scored for scored in batch]
            correct += outputs.is_top1.sum(dim=1).tolist()
            if progress is not None:
                progress(len(losses) / len(every))
    return Evaluation(loss_sums=tuple(losses), num_tokens=tuple(counts), num_correct=tuple(correct))


def batches(every: Sequence[Window], micro_batch: int) -> Iterator[Sequence[Window]]:
    """Group consecutive windows of equal length, so that no padding is needed."""
    group: list[Window] = []
    for window in every:
        length = window.end - window.start
        if group and (len(group) == micro_batch or length != group[0].end - group[0].start):
            yield group
            group = []
        group.append(window)
    if group:
        yield group
