"""Tokenize split examples and write the folder of prepared data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from autosft.profiles.dataset.chat import Rendered, render
from autosft.profiles.dataset.control_tokens import (
    ControlTokens,
    control_tokens,
    without_repeats,
    without_repeats_of_pair,
    without_result_marks,
    without_trailing_space,
)
from autosft.profiles.dataset.formats import (
    Completion,
    Conversation,
    DataFormat,
    Example,
    Passage,
    cut_rounds,
)
from autosft.profiles.dataset.prepared import (
    IGNORED,
    PreparedData,
    RoundsCut,
    SourceShare,
    Split,
    SplitCounts,
    counts_of,
    split_name,
)
from autosft.profiles.dataset.prepared_files import table_of, write_prepared
from autosft.profiles.dataset.problems import BadRecord, Problems, brief
from autosft.profiles.dataset.remarks import Remarks
from autosft.profiles.dataset.split import SplitExamples
from autosft.profiles.dataset.template import ChatTemplate, RenderError, chat_template, notes
from autosft.profiles.dataset.template_date import record_date
from autosft.profiles.dataset.tokens import Tokenized, not_known, pack, tokenize_chats, tokenize_completions
from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1000
_BATCH_CHARACTERS = 1 << 20
_DECODE_EVERY = 20  # the mask of every 20th conversation is also checked by decoding it
_NUM_SAMPLES = 20
_SAMPLE_TOKENS = 4000  # longer samples are cut

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokenizing:
    """How the examples of a folder are tokenized."""

    tokenizer: Any
    template: ChatTemplate | None  # None: there are no conversations to train on
    block_size: int  # tokens per block of plain text
    max_positions: int | None  # longer examples are cut there; None: no limit

    def capped(self, examples: Sequence[Tokenized]) -> list[Tokenized]:
        """Truncate examples to the model's longest position."""
        limit = self.max_positions
        if limit is None:
            return list(examples)
        return [
            replace(example, input_ids=example.input_ids[:limit], labels=example.labels[:limit])
            for example in examples
        ]

    def num_capped(self, examples: Sequence[Tokenized]) -> int:
        limit = self.max_positions
        return 0 if limit is None else sum(len(example.input_ids) > limit for example in examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """The tokenized examples, truncated to the model's longest position."""

    splits: Mapping[Split, list[Tokenized]]
    shares: tuple[SourceShare, ...]
    num_capped: int  # examples that were longer


def build(
    folder: Path,
    parts: SplitExamples,
    *,
    tokenizer: Any,
    model: str,
    sources: Sequence[tuple[str, DataFormat, float]],
    fingerprint: str,
    block_size: int,
    train_rounds: Sequence[int],
    max_positions: int | None,
    problems: Problems,
    remarks: Remarks,
    template_date: str | None = None,
    said: Sequence[str] = (),
) -> None:
    """Tokenize all splits and write `folder` atomically, unless another process has just written it.

    `sources` holds the name, format and weight of each source; training examples come in their order.
    `template_date` replaces today's date in chat templates; `said` precedes the notes.  Raises `UserError`
    for records that the chat template cannot render, for an incorrect mask, and where the folder cannot be
    written.
    """
    template = _template_of(parts.train, tokenizer, model, date=template_date)
    _refuse_unusable(template, tokenizer, model, rounds_of=sources[0][1] if train_rounds else None)
    own_template = template is not None and template.own is not None
    if template is not None and own_template:
        tokenizer.chat_template = template.own
    parts, repeated = _without_repeats(parts, control_tokens(tokenizer, template))
    notes = [*said, *remarks.sentences(), *repeated, *_notes(template, parts)]
    how = _Tokenizing(
        tokenizer=tokenizer, template=template, block_size=block_size, max_positions=max_positions
    )
    tokens = _tokenize_splits(how, parts, sources, problems)
    notes += _answers_apart(model, parts.train, len(tokens.splits[Split.TRAIN]))
    notes += not_known(tokenizer, model, [each for split in tokens.splits.values() for each in split])
    tables, counts, rounds = _lay_out(how, parts.train, tokens, train_rounds)
    prepared = PreparedData(
        path=folder, source="", eval_source=None, format=sources[0][1], fingerprint=fingerprint,
        tokenizer=model, own_template=own_template, template_date=template_date,
        eos_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.pad_token, pad_token_id=tokenizer.pad_token_id,
        train=counts[Split.TRAIN], eval=counts[Split.EVAL], final=counts[Split.FINAL],
        rounds=rounds, sources=tokens.shares, skipped=problems.counts(), num_capped=tokens.num_capped,
        num_duplicates_removed=parts.num_duplicates_removed,
        largest_token=max(int(np.max(each.input_ids)) for split in tokens.splits.values() for each in split),
        samples=tuple(_spans(tokenizer, example) for example in tokens.splits[Split.TRAIN][:_NUM_SAMPLES]),
        notes=tuple(notes),
    )  # fmt: skip
    if template_date is not None:
        record_date(tokenizer, template_date)
    write_prepared(prepared, tables, tokenizer)


def _template_of(
    examples: Sequence[Example], tokenizer: Any, model: str, *, date: str | None
) -> ChatTemplate | None:
    has_chats = any(isinstance(example, Conversation) for example in examples)
    return chat_template(tokenizer, model, date=date) if has_chats else None


def _refuse_unusable(
    template: ChatTemplate | None, tokenizer: Any, model: str, *, rounds_of: DataFormat | None
) -> None:
    """Raise UserError if there are no rounds to cut (`rounds_of`: the data's format), or no end token."""
    if template is not None:
        return
    if rounds_of is not None:
        raise UserError(
            f"{rounds_of.label} has no rounds that could be cut.",
            remedy="Leave --max-rounds out: it is for conversations.",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model} has no end-of-sequence token: a model could not learn to stop.",
            remedy="Set eos_token in its tokenizer_config.json.",
        )


def _tokenize_splits(
    how: _Tokenizing,
    parts: SplitExamples,
    sources: Sequence[tuple[str, DataFormat, float]],
    problems: Problems,
) -> _Tokens:
    """Tokenize all splits, the training examples source by source.  Raises UserError if one is empty."""
    by_source = [
        _tokenized(how, [example for example in parts.train if example.source == number], problems)
        for number in range(len(sources))
    ]
    whole = {
        Split.TRAIN: [example for own in by_source for example in own],
        Split.EVAL: _tokenized(how, parts.eval, problems),
        Split.FINAL: _tokenized(how, parts.final, problems),
    }
    problems.settle()
    for split, examples in whole.items():
        if not examples:
            raise UserError(f"no usable record is left for the {split.value} split.")
    return _Tokens(
        splits={split: how.capped(examples) for split, examples in whole.items()},
        shares=tuple(_share(source, how.capped(own)) for source, own in zip(sources, by_source, strict=True)),
        num_capped=sum(how.num_capped(examples) for examples in whole.values()),
    )


def _share(source: tuple[str, DataFormat, float], examples: Sequence[Tokenized]) -> SourceShare:
    name, data_format, weight = source
    return SourceShare(
        name=name,
        format=data_format,
        weight=weight,
        num_examples=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_scored=sum(int(np.sum(example.labels != IGNORED)) for example in examples),
    )


def _answers_apart(model: str, examples: Sequence[Example], num_made: int) -> list[str]:
    """Return a note if conversations have become several training examples each."""
    num_chats = sum(isinstance(example, Conversation) for example in examples)
    if num_chats < len(examples) or num_made <= num_chats:
        return []
    return [
        f"the chat template of {model} writes earlier answers differently once more follows: "
        f"{num_chats:,} conversations became {num_made:,} examples, one for each answer"
    ]


def _lay_out(
    how: _Tokenizing, train: Sequence[Example], tokens: _Tokens, train_rounds: Sequence[int]
) -> tuple[dict[str, pa.Table], dict[Split, SplitCounts], tuple[RoundsCut, ...]]:
    """Return tables by folder, the splits' counts, and the training examples at each number of rounds."""
    tables = {split.value: table_of(examples) for split, examples in tokens.splits.items()}
    counts = {split: _counted(tables[split.value], examples) for split, examples in tokens.splits.items()}
    rounds = []
    for max_rounds in train_rounds:
        table, cut = _cut_to(max_rounds, how, train, num_scored=counts[Split.TRAIN].num_scored)
        tables[split_name(Split.TRAIN, max_rounds)] = table
        rounds.append(cut)
    return tables, counts, tuple(rounds)


def _counted(table: pa.Table, examples: Sequence[Tokenized]) -> SplitCounts:
    return counts_of(table, sum(example.num_turns for example in examples))


def _cut_to(
    max_rounds: int, how: _Tokenizing, train: Sequence[Example], *, num_scored: int
) -> tuple[pa.Table, RoundsCut]:
    """Tokenize the training examples cut to `max_rounds`; uncut they have `num_scored` scored tokens."""
    others = [example for example in train if not isinstance(example, Conversation)]
    conversations = [cut_rounds(chat, max_rounds) for chat in train if isinstance(chat, Conversation)]
    learnable = [*others, *(chat for chat in conversations if chat.learned)]
    # Conversations that cannot be rendered were counted when they were whole.
    tokenized = how.capped(_tokenized(how, learnable, Problems(skip=True)))
    if not tokenized:
        raise UserError(f"--max-rounds {max_rounds}: no training example has an answer left.")
    table = table_of(tokenized)
    counts = _counted(table, tokenized)
    cut = RoundsCut(
        max_rounds=max_rounds,
        cut_share=sum(chat.is_cut for chat in conversations) / len(conversations),
        lost_scored_share=1.0 - counts.num_scored / max(1, num_scored),
        train=counts,
    )
    return table, cut


def _without_repeats(parts: SplitExamples, tokens: ControlTokens) -> tuple[SplitExamples, list[str]]:
    """Strip control tokens that the template writes around turns anyway; return notes on it too."""
    num_tokens = num_marks = num_texts = 0
    stripped: dict[Split, tuple[Example, ...]] = {}
    for split in Split:
        kept: list[Example] = []
        for example in getattr(parts, split.value):
            new: Example = example
            if isinstance(new, Conversation):
                new = without_repeats(new, tokens)
                num_tokens += new is not example
                unmarked = without_result_marks(new) if tokens.marks_results else new
                num_marks += unmarked is not new
                new = unmarked
            elif isinstance(new, Completion):
                new = without_repeats_of_pair(new, tokens)
                num_tokens += new is not example
            else:
                new = without_trailing_space(new, tokens)
                num_texts += tokens.stripped(new.text) != new.text
            kept.append(new)
        stripped[split] = tuple(kept)
    said = []
    if num_tokens:
        said.append(
            f"{num_tokens:,} examples begin or end turns with {' or '.join((*tokens.starts, *tokens.ends))}, "
            "which is written there anyway: it is not doubled"
        )
    if num_texts:
        ends = " or ".join((*tokens.starts, *tokens.ends))
        said.append(f"{num_texts:,} passages begin or end with {ends}: it is not added to them again")
    if num_marks:
        said.append(
            f"{num_marks:,} examples have <tool_response> around the results of tools, as the chat template "
            "writes it: it is not doubled"
        )
    train, evaluated, final = (stripped[split] for split in (Split.TRAIN, Split.EVAL, Split.FINAL))
    return replace(parts, train=train, eval=evaluated, final=final), said


def _tokenized(how: _Tokenizing, examples: Sequence[Example], problems: Problems) -> list[Tokenized]:
    """Tokenize the examples of one split: conversations, then pairs, then text, each in order.

    Conversations that the template cannot render go to `problems`.
    """
    passages = [example for example in examples if isinstance(example, Passage)]
    pairs = [example for example in examples if isinstance(example, Completion)]
    chats = [example for example in examples if isinstance(example, Conversation)]
    made: list[Tokenized | BadRecord] = []
    for rendered in _batches(_rendered(how.template, chats, made), lambda each: len(each.text)):
        made += tokenize_chats(how.tokenizer, rendered, decode_every=_DECODE_EVERY)
    for batch in _batches(pairs, lambda pair: len(pair.prompt) + len(pair.completion)):
        made += tokenize_completions(how.tokenizer, batch)
    made += pack(how.tokenizer, passages, how.block_size)
    problems.bad += [each for each in made if isinstance(each, BadRecord)]
    return [each for each in made if isinstance(each, Tokenized)]


def _rendered(
    template: ChatTemplate | None, chats: Sequence[Conversation], made: list[Tokenized | BadRecord]
) -> Iterator[Rendered]:
    """Render conversations one by one; append those that the template cannot render to `made`."""
    for chat in chats:
        assert template is not None
        try:
            yield from render(template, chat)
        except RenderError as error:
            made.append(BadRecord(where=chat.where, reason=error.reason, detail=brief(error.detail, 300)))


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in batches of at most `_BATCH` items and `_BATCH_CHARACTERS` characters.

    A longer item is its own batch.  The tokenizer's results take about 100 bytes per token until they are
    copied into arrays.
    """
    batch: list[T] = []
    num_characters = 0
    for item in items:
        if batch and (len(batch) == _BATCH or num_characters + size(item) > _BATCH_CHARACTERS):
            yield batch
            batch, num_characters = [], 0
        batch.append(item)
        num_characters += size(item)
    if batch:
        yield batch


def _notes(template: ChatTemplate | None, parts: SplitExamples) -> list[str]:
    """Return notes about conversations; none where there are none to train on."""
    if template is None:
        return []
    conversations = [
        example for example in (*parts.train, *parts.eval, *parts.final) if isinstance(example, Conversation)
    ]
    said = notes(
        template,
        has_system=any(conversation.messages[0]["role"] == "system" for conversation in conversations),
        has_tools=any(
            conversation.tools or any(message.get("tool_calls") for message in conversation.messages)
            for conversation in conversations
        ),
    )
    control = [re.escape(token) for token in template.tokenizer.all_special_tokens]
    num_cut = sum(conversation.is_cut for conversation in conversations)
    if num_cut:
        said.append(
            f"later rounds are left out of {num_cut:,} of {len(conversations):,} conversations "
            f"({num_cut / len(conversations):.1%}), also of those that are evaluated"
        )
    found = [
        match.group()
        for conversation in conversations
        if control and (match := re.search("|".join(control), _all_text(conversation)))
    ]
    if found:
        said.append(
            f"{len(found):,} conversations hold control tokens of the tokenizer in their text, such as "
            f"{found[0]}: the model reads them as such"
        )
    return said


def _all_text(conversation: Conversation) -> str:
    return "\n".join(message["content"] for message in conversation.messages)


def _spans(tokenizer: Any, example: Tokenized) -> tuple[tuple[str, bool], ...]:
    """Decode an example in runs of tokens that are all scored or all unscored."""
    scored = example.labels[:_SAMPLE_TOKENS] != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(scored)]
    spans = [
        (tokenizer.decode(example.input_ids[start:end].tolist()), bool(scored[start]))
        for start, end in pairwise(edges)
    ]
    if (num_more := len(example.labels) - len(scored)) > 0:
        spans.append((f"… and {num_more:,} more tokens", False))
    return tuple(spans)
