"""Tokenizes split examples and writes the folder of prepared data."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
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
    MANIFEST,
    PreparedData,
    RoundsCut,
    SourceShare,
    Split,
    counts_of,
    manifest_of,
    split_name,
)
from autosft.profiles.dataset.problems import BadRecord, Problems, brief
from autosft.profiles.dataset.remarks import Remarks
from autosft.profiles.dataset.split import SplitExamples
from autosft.profiles.dataset.template import ChatTemplate, RenderError, chat_template, notes
from autosft.profiles.dataset.template_date import record_date
from autosft.profiles.dataset.tokens import Tokenized, pack, tokenize_chats, tokenize_completions
from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1000
_BATCH_CHARACTERS = 1 << 20
_DECODE_EVERY = 20  # every 20th conversation also has its mask checked by decoding it
_NUM_SAMPLES = 20
_SAMPLE_TOKENS = 4000  # more of an example is not shown

T = TypeVar("T")


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
    """Tokenize all splits and write `folder` at once, or find that another process has just written it.

    `sources` gives the name, format and weight of each; the training examples are in their order.
    `template_date` is what a chat template writes for today's; `said` stands before the notes.
    Raises `UserError` for records that the chat template cannot render, for a mask that does not hold,
    and where the folder cannot be written.
    """
    has_chats = any(isinstance(example, Conversation) for example in parts.train)
    template = chat_template(tokenizer, model, date=template_date) if has_chats else None
    if train_rounds and template is None:
        raise UserError(
            f"{sources[0][1].label} has no rounds that could be cut.",
            remedy="Leave --max-rounds out: it is for conversations.",
        )
    if template is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model} has no end-of-sequence token: a model could not learn to stop.",
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    if template is not None and template.own is not None:
        tokenizer.chat_template = template.own

    tokens = control_tokens(tokenizer, template)
    parts, repeated = _without_repeats(parts, tokens)
    said = [*said, *remarks.sentences(), *repeated, *([] if template is None else _notes(template, parts))]
    made: dict[Split, list[Tokenized]] = {}
    shares = []
    for number, (name, data_format, weight) in enumerate(sources):
        own = [example for example in parts.train if example.source == number]
        tokenized = _tokenized(tokenizer, template, own, block_size, problems)
        made.setdefault(Split.TRAIN, []).extend(tokenized)
        if max_positions is not None:
            tokenized = [_capped(example, max_positions) for example in tokenized]
        shares.append(
            SourceShare(
                name=name,
                format=data_format,
                weight=weight,
                num_examples=len(tokenized),
                num_tokens=sum(len(example.input_ids) for example in tokenized),
                num_scored=sum(int(np.sum(example.labels != IGNORED)) for example in tokenized),
            )
        )
    num_chats = sum(isinstance(example, Conversation) for example in parts.train)
    num_made = len(made[Split.TRAIN])
    if template is not None and num_chats == len(parts.train) and num_made > num_chats:
        said.append(
            f"the chat template of {model} writes earlier answers differently once more follows: "
            f"{num_chats:,} conversations became {num_made:,} examples, one for each answer"
        )
    for split in (Split.EVAL, Split.FINAL):
        made[split] = _tokenized(tokenizer, template, getattr(parts, split.value), block_size, problems)
    problems.settle()
    for split, tokenized in made.items():
        if not tokenized:
            raise UserError(f"no usable record is left for the {split.value} split.")

    num_capped = 0
    if max_positions is not None:
        num_capped = sum(len(example.input_ids) > max_positions for each in made.values() for example in each)
        made = {split: [_capped(example, max_positions) for example in each] for split, each in made.items()}
    tables = {split.value: _table(tokenized) for split, tokenized in made.items()}
    counts = {
        split: counts_of(tables[split.value], sum(example.num_turns for example in tokenized))
        for split, tokenized in made.items()
    }
    rounds = []
    for max_rounds in train_rounds:
        chats = [example for example in parts.train if isinstance(example, Conversation)]
        others = [example for example in parts.train if not isinstance(example, Conversation)]
        conversations = [cut_rounds(chat, max_rounds) for chat in chats]
        learnable = [*others, *(chat for chat in conversations if chat.learned)]
        # What cannot be rendered was counted above.
        tokenized = _tokenized(tokenizer, template, learnable, block_size, Problems(skip=True))
        if not tokenized:
            raise UserError(f"--max-rounds {max_rounds}: no training example has an answer left.")
        if max_positions is not None:
            tokenized = [_capped(example, max_positions) for example in tokenized]
        table = tables[split_name(Split.TRAIN, max_rounds)] = _table(tokenized)
        cut = counts_of(table, sum(example.num_turns for example in tokenized))
        rounds.append(
            RoundsCut(
                max_rounds=max_rounds,
                cut_share=sum(chat.is_cut for chat in conversations) / len(conversations),
                lost_scored_share=1.0 - cut.num_scored / max(1, counts[Split.TRAIN].num_scored),
                train=cut,
            )
        )
    prepared = PreparedData(
        path=folder,
        source="",
        eval_source=None,
        format=sources[0][1],
        fingerprint=fingerprint,
        tokenizer=model,
        own_template=template is not None and template.own is not None,
        eos_token_id=tokenizer.eos_token_id,
        train=counts[Split.TRAIN],
        eval=counts[Split.EVAL],
        final=counts[Split.FINAL],
        skipped=problems.counts(),
        num_duplicates_removed=parts.num_duplicates_removed,
        num_capped=num_capped,
        notes=tuple(said),
        samples=tuple(_spans(tokenizer, example) for example in made[Split.TRAIN][:_NUM_SAMPLES]),
        rounds=tuple(rounds),
        template_date=template_date,
        largest_token=max(int(np.max(each.input_ids)) for split in made.values() for each in split),
        pad_token=tokenizer.pad_token,
        pad_token_id=tokenizer.pad_token_id,
        sources=tuple(shares),
    )
    if template_date is not None:
        record_date(tokenizer, template_date)
    _write(prepared, tables, tokenizer)


def _without_repeats(parts: SplitExamples, tokens: ControlTokens) -> tuple[SplitExamples, list[str]]:
    """Strip what stands in the data and is written around turns as well; return sentences on it too."""
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


def _tokenized(
    tokenizer: Any,
    template: ChatTemplate | None,
    examples: Sequence[Example],
    block_size: int,
    problems: Problems,
) -> list[Tokenized]:
    """Tokenize the examples of one split: conversations, then pairs, then text, each in order.

    Conversations that the template cannot render go to `problems`.
    """
    passages = [example for example in examples if isinstance(example, Passage)]
    pairs = [example for example in examples if isinstance(example, Completion)]
    chats = [example for example in examples if isinstance(example, Conversation)]
    made: list[Tokenized | BadRecord] = []
    for rendered in _batches(_rendered(template, chats, made), lambda each: len(each.text)):
        made += tokenize_chats(tokenizer, rendered, decode_every=_DECODE_EVERY)
    for batch in _batches(pairs, lambda pair: len(pair.prompt) + len(pair.completion)):
        made += tokenize_completions(tokenizer, batch)
    made += pack(tokenizer, passages, block_size)
    problems.bad += [each for each in made if isinstance(each, BadRecord)]
    return [each for each in made if isinstance(each, Tokenized)]


def _rendered(
    template: ChatTemplate | None, chats: Sequence[Conversation], made: list[Tokenized | BadRecord]
) -> Iterator[Rendered]:
    """Render conversations one by one; `made` takes those that the template cannot render."""
    for chat in chats:
        assert template is not None
        try:
            yield from render(template, chat)
        except RenderError as error:
            made.append(BadRecord(where=chat.where, reason=error.reason, detail=brief(error.detail, 300)))


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in batches of at most `_BATCH` items and `_BATCH_CHARACTERS` characters.

    A longer item is a batch by itself.  What the tokenizer returns takes about 100 bytes per token until it
    is laid out in arrays.
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


def _notes(template: ChatTemplate, parts: SplitExamples) -> list[str]:
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


def _capped(example: Tokenized, max_positions: int) -> Tokenized:
    return replace(
        example, input_ids=example.input_ids[:max_positions], labels=example.labels[:max_positions]
    )


def _table(examples: Sequence[Tokenized]) -> pa.Table:
    """Lay examples out as Arrow columns, without a Python object per token."""
    import pyarrow as pa

    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int32)
    chunks = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        offsets = np.concatenate([[0], np.cumsum(lengths[start : start + _BATCH])]).astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, np.concatenate(values))
            for values in (
                [example.input_ids for example in batch],
                [example.labels for example in batch],
            )
        ]
        first = [_first_label(example) for example in batch]
        columns += [pa.array(lengths[start : start + _BATCH]), pa.array(first, type=pa.int32())]
        chunks.append(pa.RecordBatch.from_arrays(columns, names=_COLUMNS))
    return pa.Table.from_batches(chunks)


def _first_label(example: Tokenized) -> int:
    """Return the position of the first scored token; the length where there is none."""
    scored = np.flatnonzero(example.labels != IGNORED)
    return int(scored[0]) if len(scored) else len(example.labels)


def _spans(tokenizer: Any, example: Tokenized) -> tuple[tuple[str, bool], ...]:
    """Decode an example in runs of tokens that are all scored or all not."""
    scored = example.labels[:_SAMPLE_TOKENS] != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(scored)]
    spans = [
        (tokenizer.decode(example.input_ids[start:end].tolist()), bool(scored[start]))
        for start, end in pairwise(edges)
    ]
    if (num_more := len(example.labels) - len(scored)) > 0:
        spans.append((f"… and {num_more:,} more tokens", False))
    return tuple(spans)


def _write(prepared: PreparedData, tables: dict[str, pa.Table], tokenizer: Any) -> None:
    """Write the folder beside its place and rename it there, so that it is whole or not there at all."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    making = prepared.path.with_name(f".{prepared.path.name}.{uuid.uuid4().hex}")
    try:
        making.mkdir(parents=True)
        for name, table in tables.items():
            Dataset(table).save_to_disk(str(making / name))
        tokenizer.save_pretrained(str(making / "tokenizer"))
        manifest = json.dumps(manifest_of(prepared), indent=1, ensure_ascii=False)
        (making / MANIFEST).write_text(manifest, encoding="utf-8")
        try:
            making.rename(prepared.path)
        except OSError:
            if not (prepared.path / MANIFEST).exists():
                raise
            # Another process was first; its content is the same.
    except OSError as error:
        raise UserError(
            f"the prepared data cannot be written to {prepared.path.parent}: {error.strerror or error}.",
            remedy="Free some space or choose another cache folder.",
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


_COLUMNS = ["input_ids", "labels", "length", "first_label"]
