"""Prepared data on disk: its content, the lengths of its examples, and what truncation cuts off."""

from __future__ import annotations

import enum
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autosft.profiles.dataset.formats import DataFormat
from autosft.profiles.errors import UserError
from autosft.profiles.recipe import LengthProfile

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from autosft.profiles.dataset.sources import Source

IGNORED = -100  #: label of a token that is not scored: torch's cross-entropy default `ignore_index`

#: The default length truncates at most this share of the training examples.
MAX_TRUNCATED_SHARE = 0.01
_SHORTEST_SEQ_LEN = 64

MANIFEST = "manifest.json"


class Split(enum.Enum):
    """The splits of prepared data, by the names of their folders."""

    TRAIN = "train"  #: learned from
    EVAL = "eval"  #: never learned from; trials are compared on it
    FINAL = "final"  #: neither learned from nor used to choose: the winner's unbiased score


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """The counts of one split; lengths in tokens, before truncation by a trial."""

    num_examples: int
    num_turns: int  # messages of conversations; prompt and completion count as two, a block of text as one
    num_tokens: int
    num_scored: int  # tokens that carry a label
    median_length: int
    p95_length: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsCut:
    """The training examples with each conversation cut to at most `max_rounds` rounds."""

    max_rounds: int
    cut_share: float  # of the conversations, 0..1
    lost_scored_share: float  # of the scored tokens, 0..1
    train: SplitCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShare:
    """The contribution of one source to the training examples."""

    name: str
    format: DataFormat
    weight: float  # how often its examples are used
    num_examples: int  # training examples, counted as often as they are used
    num_tokens: int
    num_scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Tokenized data in a folder: Arrow folders `train/`, `eval/`, `final/`, and `tokenizer/`.

    For each of `rounds`, `train-<n>-rounds/` holds the training examples cut to n rounds; the evaluation
    examples are the same for all of them.

    Each split is a Hugging Face data set (`datasets.load_from_disk`) with the columns input_ids, labels
    (-100 where not scored), length, and first_label (position of the first scored token).  Examples are
    not truncated to a trial's length.  `tokenizer/` is the model's tokenizer, with the chat template that
    was used; it belongs in every checkpoint trained on this data.
    """

    path: Path
    source: str  # as given: one, or several separated by commas
    eval_source: str | None  # None if the evaluation examples were held out of the source
    format: DataFormat  # of the first source
    fingerprint: str  # of file contents, tokenizer and options; the name of the folder
    tokenizer: str  # as given: folder or hub id
    own_template: bool  # the tokenizer has no chat template and autosft's plain one was used
    eos_token_id: int | None  # None only if the chat template ends turns by other means
    train: SplitCounts
    eval: SplitCounts
    final: SplitCounts
    skipped: tuple[tuple[str, int], ...]  # reason and number of bad records left out
    num_duplicates_removed: int  # from training, because evaluation has the same content
    num_capped: int  # examples cut at the model's longest position
    notes: tuple[str, ...]  # sentences for the user on what was adapted
    samples: tuple[tuple[tuple[str, bool], ...], ...]  # training examples as (text, is scored) spans
    rounds: tuple[RoundsCut, ...] = ()
    template_date: str | None = None  # the date in a chat template that writes today's; else None
    largest_token: int = -1  # the largest id in the examples; -1 if it was not recorded
    pad_token: str | None = None  # of the tokenizer
    pad_token_id: int | None = None
    sources: tuple[SourceShare, ...] = ()

    def split_dir(self, split: Split, max_rounds: int | None = None) -> Path:
        return self.path / split_name(split, max_rounds)

    def counts(self, split: Split) -> SplitCounts:
        return {Split.TRAIN: self.train, Split.EVAL: self.eval, Split.FINAL: self.final}[split]

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"


def split_name(split: Split, max_rounds: int | None = None) -> str:
    """Return the name of a split's folder; `max_rounds` only for the training split."""
    assert max_rounds is None or split is Split.TRAIN
    return split.value if max_rounds is None else f"{split.value}-{max_rounds}-rounds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What truncation to a length removes from the training examples."""

    seq_len: int
    truncated_share: float  # of the examples, 0..1
    lost_scored_share: float  # of the scored tokens, 0..1
    num_unscored: int  # examples left without a scored token, from which nothing can be learned


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqLenChoice:
    """A truncation length and the reason for it."""

    seq_len: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Lengths of a split's examples, and the positions of their scored tokens."""

    length: npt.NDArray[np.int64]  # (examples,)
    scored_at: npt.NDArray[np.int64]  # (scored tokens,) position within the example
    scored_in: npt.NDArray[np.int64]  # (scored tokens,) index of the example, ascending


def load_prepared(path: Path) -> PreparedData:
    """Load prepared data from its folder, such as `TrialJob.data_dir`."""
    fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for split in Split:
        fields[split.value] = SplitCounts(**fields[split.value])
    fields["format"] = DataFormat(fields["format"])
    fields["skipped"] = tuple((reason, count) for reason, count in fields["skipped"])
    fields["notes"] = tuple(fields["notes"])
    fields["samples"] = tuple(
        tuple((text, scored) for text, scored in sample) for sample in fields["samples"]
    )
    fields["rounds"] = tuple(
        RoundsCut(**{**cut, "train": SplitCounts(**cut["train"])}) for cut in fields.get("rounds", ())
    )
    fields["sources"] = tuple(
        SourceShare(**{**share, "format": DataFormat(share["format"])}) for share in fields.get("sources", ())
    )
    return PreparedData(path=path, **fields)


def length_profile(
    prepared: PreparedData, seq_len: int, split: Split | str = Split.TRAIN, *, max_rounds: int | None = None
) -> LengthProfile:
    """Return lengths and scored tokens of a split's examples after truncation to `seq_len` tokens.

    `max_rounds` is one of `prepared.rounds`, or None for whole conversations.  Examples without
    remaining scored tokens are included, with `scored[i] == 0`.
    """
    lengths = _read_lengths(prepared, Split(split), max_rounds)
    scored = np.bincount(lengths.scored_in[lengths.scored_at < seq_len], minlength=len(lengths.length))
    return LengthProfile(
        lengths=tuple(np.minimum(lengths.length, seq_len).tolist()),
        scored=tuple(scored.tolist()),
        max_length=seq_len,
    )


def truncation_report(
    prepared: PreparedData, seq_lens: Sequence[int], split: Split | str = Split.TRAIN
) -> tuple[Truncation, ...]:
    """Return what truncation to each of `seq_lens` removes from a split, in the order given."""
    lengths = _read_lengths(prepared, Split(split), None)
    num_examples, num_scored = len(lengths.length), max(1, len(lengths.scored_at))
    scored_up_to = np.cumsum(np.bincount(lengths.scored_at, minlength=1))  # tokens at positions 0..p
    _, first = np.unique(lengths.scored_in, return_index=True)
    first_scored_at = np.sort(lengths.scored_at[first])
    return tuple(
        Truncation(
            seq_len=seq_len,
            truncated_share=float(np.mean(lengths.length > seq_len)),
            lost_scored_share=1.0 - float(scored_up_to[min(seq_len, len(scored_up_to)) - 1]) / num_scored,
            num_unscored=num_examples - int(np.searchsorted(first_scored_at, seq_len)),
        )
        for seq_len in seq_lens
    )


def choose_seq_len(prepared: PreparedData, model_max: int) -> SeqLenChoice:
    """Choose the smallest of 64, 128, ... and `model_max` that truncates at most 1 % of training examples."""
    candidates = [_SHORTEST_SEQ_LEN << k for k in range(32) if _SHORTEST_SEQ_LEN << k < model_max]
    candidates.append(model_max)
    report = truncation_report(prepared, candidates)
    chosen = next((cut for cut in report if cut.truncated_share <= MAX_TRUNCATED_SHARE), report[-1])
    share = f"cuts {chosen.truncated_share:.1%} of the examples"
    if chosen.truncated_share > MAX_TRUNCATED_SHARE:
        return SeqLenChoice(seq_len=model_max, reason=f"{model_max} is the model's longest and {share}")
    shorter = [cut for cut in report if cut.seq_len < chosen.seq_len]
    if not shorter:
        return SeqLenChoice(seq_len=chosen.seq_len, reason=f"{chosen.seq_len} {share}")
    return SeqLenChoice(
        seq_len=chosen.seq_len,
        reason=f"{chosen.seq_len} {share}; {shorter[-1].seq_len} would cut {shorter[-1].truncated_share:.1%}",
    )


def eval_fingerprint(dataset: datasets.Dataset, seq_len: int) -> str:
    """Return the sha256 (hex) of token ids and labels of all examples, in order, truncated to `seq_len`.

    Two trials whose evaluation sets have the same fingerprint are measured on the same tokens.
    """
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        columns = (batch.column("input_ids"), batch.column("labels"))
        for ids, labels in zip(*(column.combine_chunks() for column in columns), strict=True):
            kept = [np.asarray(row.values.to_numpy()[:seq_len], dtype="<i4") for row in (ids, labels)]
            digest.update(len(kept[0]).to_bytes(4, "little"))
            for row in kept:
                digest.update(row.tobytes())
    return digest.hexdigest()


def tokens_fingerprint(prepared: PreparedData, max_rounds: int | None = None) -> str:
    """Return the sha256 (hex) of token ids and labels of all training examples.

    Unlike `PreparedData.fingerprint` it does not depend on files or libraries: equal values mean equal
    training data.
    """
    from datasets import load_from_disk

    dataset = load_from_disk(str(prepared.split_dir(Split.TRAIN, max_rounds)))
    return eval_fingerprint(dataset, seq_len=sys.maxsize)


def sample_with_mask(prepared: PreparedData, n: int) -> tuple[tuple[tuple[str, bool], ...], ...]:
    """Return up to `n` training examples as decoded (text, is scored) spans, for a coloured display."""
    return prepared.samples[:n]


def counts_of(table: pa.Table, num_turns: int) -> SplitCounts:
    """Return the counts of a split's table."""
    lengths = table.column("length").to_numpy()
    _, labels = _flat(table.column("labels"))
    empty = len(lengths) == 0
    return SplitCounts(
        num_examples=len(lengths),
        num_turns=num_turns,
        num_tokens=int(lengths.sum()),
        num_scored=int((labels != IGNORED).sum()),
        median_length=0 if empty else int(np.median(lengths)),
        p95_length=0 if empty else int(np.percentile(lengths, 95)),
        longest=0 if empty else int(lengths.max()),
    )


def manifest_of(prepared: PreparedData) -> dict[str, Any]:
    """Return the manifest's content: all fields except the folder."""
    fields = {name: getattr(prepared, name) for name in prepared.__dataclass_fields__ if name != "path"}
    for split in Split:
        counts = prepared.counts(split)
        fields[split.value] = {name: getattr(counts, name) for name in counts.__dataclass_fields__}
    fields["format"] = prepared.format.value
    fields["rounds"] = [asdict(cut) for cut in prepared.rounds]
    fields["sources"] = [{**asdict(share), "format": share.format.value} for share in prepared.sources]
    return fields


def with_sources(
    prepared: PreparedData, source: str, eval_source: str | None, model: str, given: Sequence[Source]
) -> PreparedData:
    """Return the same prepared content under the names given this time, with what is said of these files."""
    shares = tuple(replace(share, name=one.name) for share, one in zip(prepared.sources, given, strict=True))
    of_files = [f"{one.name}: {said}" for one in given for said in one.said]
    of_content = [note.replace(prepared.tokenizer, model) for note in prepared.notes]
    return replace(
        prepared,
        source=source,
        eval_source=eval_source,
        tokenizer=model,
        sources=shares,
        notes=tuple(dict.fromkeys([*of_files, *of_content])),
    )


def require_embeddings(prepared: PreparedData, num_embeddings: int) -> PreparedData:
    """Return the data, with a note if the tokenizer's pad token has no embedding and another one pads.

    Raises UserError if a token of the examples has none: training would end with an index error.
    """
    if prepared.largest_token >= num_embeddings:
        raise UserError(
            f"{prepared.source} holds a token with the id {prepared.largest_token:,} by the tokenizer of "
            f"{prepared.tokenizer}, and the model has {num_embeddings:,} embeddings "
            f"(0 to {num_embeddings - 1:,}).",
            remedy="Tokens were added to the tokenizer alone: resize the model with "
            "resize_token_embeddings(len(tokenizer)) and save it, or use the tokenizer that belongs to it.",
        )
    if prepared.pad_token_id is None or prepared.pad_token_id < num_embeddings:
        return prepared
    said = (
        f"the pad token {prepared.pad_token} of {prepared.tokenizer} has the id {prepared.pad_token_id:,}, "
        f"and the model has {num_embeddings:,} embeddings (0 to {num_embeddings - 1:,})"
    )
    if prepared.eos_token_id is None or prepared.eos_token_id >= num_embeddings:
        raise UserError(
            f"{said}; no end-of-sequence token could pad instead.",
            remedy="Set pad_token in its tokenizer_config.json to a token that the model knows.",
        )
    note = f"{said}: the end-of-sequence token pads instead"
    return replace(prepared, notes=(*prepared.notes, note))


def _read_lengths(prepared: PreparedData, split: Split, max_rounds: int | None) -> _Lengths:
    from datasets import load_from_disk

    dataset = load_from_disk(str(prepared.split_dir(split, max_rounds)))
    lengths, labels = _flat(dataset.data.table.column("labels"))
    scored = np.flatnonzero(labels != IGNORED)
    scored_in = np.repeat(np.arange(len(lengths)), lengths)[scored]
    starts = np.cumsum(lengths) - lengths
    return _Lengths(length=lengths, scored_at=scored - starts[scored_in], scored_in=scored_in)


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return row lengths and concatenated values of a column of lists, without a Python object per value."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    return lengths, pc.list_flatten(column).to_numpy()
