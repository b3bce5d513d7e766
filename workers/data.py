"""Load prepared data in a training process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from autosft.profiles.errors import UserError
from autosft.profiles.memory.host_kernels import padded_size
from autosft.studies.trial import TrialJob

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_split(job: TrialJob, split: str) -> Dataset:
    """Open a prepared split, memory-mapped: all trials of a node share its pages."""
    from datasets import load_from_disk

    return load_from_disk(str(Path(job.data_dir) / split))


def require_same_evaluation(job: TrialJob, fingerprint: str) -> None:
    """Raise UserError unless these evaluation examples are the ones that the study is measured on."""
    if fingerprint != job.pinned.eval_fingerprint:
        raise UserError(
            f"the evaluation examples in {job.data_dir} are not the ones this study is measured on "
            f"(sha256 {fingerprint[:12]}…, expected {job.pinned.eval_fingerprint[:12]}…).",
            remedy="Scores would not be comparable. Start a new study with --study NAME.",
        )


def collator(
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    padding_free: bool = False,
    in_few_sizes: bool = False,
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Return trl's collator for examples truncated to `seq_len` tokens: padded, or packed into one row.

    `in_few_sizes`: rows are padded further, to one of few lengths (`profiles.memory.host_kernels`).
    """
    together = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=padding_free)

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = together(
            [{name: example[name][:seq_len] for name in ("input_ids", "labels")} for example in examples]
        )
        return batch if padding_free or not in_few_sizes else _padded(batch, seq_len, tokenizer.pad_token_id)

    return collate


def _padded(batch: dict[str, Any], seq_len: int, pad_token_id: int) -> dict[str, Any]:
    """Return a batch with rows of a size that few share, at most `seq_len` tokens; padding has no label."""
    from torch.nn.functional import pad

    fills = {"input_ids": pad_token_id, "labels": -100}
    length = batch["input_ids"].shape[1]
    more = min(padded_size(length), seq_len) - length
    return {name: pad(rows, (0, more), value=fills.get(name, 0)) for name, rows in batch.items()}
