"""From the user's data to tokenized, split, cached examples."""

from __future__ import annotations

from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData


def prepare(
    data: str,
    *,
    model: str,
    cache_dir: Path,
    eval_data: str | None = None,
    seed: int = 0,
    eval_share: float = 0.10,
    final_share: float = 0.05,
    skip_bad_records: bool = False,
    max_rounds: int | None = None,
    block_size: int | None = None,
    max_positions: int | None = None,
    trust_remote_code: bool = False,
) -> PreparedData:
    """Read, check, split and tokenize training data, or find it prepared in the cache.

    data               file, folder or hub name; eval_data the same, or None to hold examples out of `data`
    model              folder or hub id with the tokenizer
    cache_dir          the result is a folder below it named by a fingerprint of all that decides it
    seed               chooses the held-out examples, by content: the order of the records does not matter
    eval_share         share of examples to compare trials on (at most 500)
    final_share        share for the final score (at most 500), never used to choose
    skip_bad_records   leave bad records out and count them, instead of refusing the data
    max_rounds         keep only the first rounds of a conversation (a round: a user turn and its answer)
    block_size         tokens of a block of plain text (default: 1024 or the model's longest, if shorter)
    max_positions      the model's longest position; longer examples are cut there

    Raises `UserError` for data, model or cache folder that cannot be used.
    """
    raise NotImplementedError
