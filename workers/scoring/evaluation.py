"""Score a model on fixed examples, with a loss for each, so that trials can be compared pairwise.

The score does not depend on the batch size: token losses are summed per example, and the metric is their
total over all scored tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.studies.metrics import token_metrics
from autosft.workers.ranks import Gang, SingleProcess

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Token losses of a model on the study's evaluation examples, in the order of the dataset.

    loss_sums[i]    sum of the negative log-likelihoods (nats) of the scored tokens of example i
    num_tokens[i]   how many tokens of example i are scored; 0 where truncation left none
    num_correct[i]  how many of them were the model's first choice
    """

    loss_sums: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_correct: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean loss in nats per scored token."""
        return math.fsum(self.loss_sums) / sum(self.num_tokens)

    def metrics(self) -> tuple[tuple[str, float], ...]:
        """Return every metric of the evaluation examples, and how many tokens were scored."""
        measured = tuple((metric.name, metric.value(self)) for metric in token_metrics())
        return (*measured, ("eval_tokens", float(sum(self.num_tokens))))

    def save(self, path: Path, *, step: int) -> None:
        """Write the sums as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "step": step,
            "loss_sums": self.loss_sums,
            "num_tokens": self.num_tokens,
            "num_correct": self.num_correct,
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(whole))
        partial.replace(path)


#: Added to exceptions raised in an evaluation: running out of memory there does not depend on training's
#: batches.
_NOTE = "while evaluating"


@contextmanager
def evaluating() -> Iterator[None]:
    """Mark exceptions that leave the block as raised during evaluation."""
    try:
        yield
    except Exception as error:
        error.add_note(_NOTE)
        raise


def was_evaluating(error: BaseException) -> bool:
    """Return whether an exception was raised during evaluation."""
    return _NOTE in getattr(error, "__notes__", ())


def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    *,
    collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
    micro_batch: int,
    device: torch.device,
    precision: AbstractContextManager[None] | None = None,
    on_batch: Callable[[], object] | None = None,
    gang: Gang | None = None,
) -> Evaluation:
    """Score every example once, longest first, `micro_batch` at a time, without gradients.

    `model` has trl's fused head (`add_fused_lm_head`), so that no (batch, seq, vocab) logits exist.
    `on_batch` is called after each batch, for signs of progress.  The model's training mode is restored.  The
    ranks of a `gang` share the batches, which are the same as on one device, and all return the whole
    evaluation.
    """
    import torch

    gang = gang or SingleProcess()
    lengths = dataset["length"]
    order = sorted(range(len(dataset)), key=lambda i: (-lengths[i], i))  # the largest batch first
    batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    loss_sums, num_tokens, num_correct = [0.0] * len(order), [0] * len(order), [0] * len(order)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(batches), gang.size):
                is_mine = first + gang.rank < len(batches)
                # Sharded parameters are gathered by all ranks together, so a rank without a batch runs as
                # well.
                ids = batches[first + gang.rank if is_mine else -1]
                batch = {name: value.to(device) for name, value in collate([dataset[i] for i in ids]).items()}
                with precision or nullcontext():
                    outputs = model(**batch, use_cache=False, fused_lm_head=True)
                sums = (-outputs.log_probs.float()).sum(dim=1).tolist()
                counts = outputs.label_mask.sum(dim=1).tolist()
                correct = outputs.is_top1.sum(dim=1).tolist()
                for i, *scores in zip(ids, sums, counts, correct, strict=True):
                    if is_mine:
                        loss_sums[i], num_tokens[i], num_correct[i] = scores
                if on_batch is not None:
                    on_batch()
    finally:
        model.train(was_training)
    loss_sums, *counted = gang.total([loss_sums, num_tokens, num_correct])
    num_tokens, num_correct = ([int(count) for count in counts] for counts in counted)
    return Evaluation(
        loss_sums=tuple(loss_sums), num_tokens=tuple(num_tokens), num_correct=tuple(num_correct)
    )
