"""Tokenizes split examples and writes the folder of prepared data."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autosft.profiles.dataset.chat import Rendered, render
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
    Split,
    counts_of,
    manifest_of,
    split_name,
)
from autosft.profiles.dataset.problems import BadRecord, Problems
from autosft.profiles.dataset.split import SplitExamples
from autosft.profiles.dataset.template import ChatTemplate, RenderError, chat_template, notes
from autosft.profiles.dataset.template_date import record_date
from autosft.profiles.dataset.tokens import Tokenized, pack, tokenize_chats, tokenize_completions
from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1000
_DECODE_EVERY = 20  # of the conversations, one in so many has its mask checked by decoding too
_NUM_SAMPLES = 20


def build(
    folder: Path,
    parts: SplitExamples,
    *,
    tokenizer: Any,
    model: str,
    data_format: DataFormat,
    fingerprint: str,
    block_size: int,
    train_rounds: Sequence[int],
    max_positions: int | None,
    problems: Problems,
    template_date: str | None = None,
    said: Sequence[str] = (),
) -> None:
    """Tokenize all splits and write `folder` at once, or find that another process has just written it.

    `template_date` is what a chat template writes for today's; `said` stands before the notes.

    Raises `UserError` for records that the chat template cannot render, for a mask that does not hold,
    and where the folder cannot be written.
    """
    is_chat = isinstance(parts.train[0], Conversation)
    template = chat_template(tokenizer, model, date=template_date) if is_chat else None
    if train_rounds and template is None:
        raise UserError(
            f"{data_format.label} has no rounds that could be cut.",
            remedy="Leave --max-rounds out: it is for conversations.",
        )
    if template is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model} has no end-of-sequence token: a model could not learn to stop.",
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    if template is not None and template.own is not None:
        tokenizer.chat_template = template.own

    said = [*said, *([] if template is None else _notes(template, parts))]
    made = {}
    for split in Split:
        examples = getattr(parts, split.value)
        made[split] = _tokenized(tokenizer, template, examples, block_size, problems)
        if len(made[split]) > len(examples) and template is not None and split is Split.TRAIN:
            said.append(
                f"the chat template of {model} writes earlier answers differently once more follows: "
                f"{len(examples):,} conversations became {len(made[split]):,} examples, one an answer"
            )
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
        conversations = [cut_rounds(one, max_rounds) for one in parts.train if isinstance(one, Conversation)]
        learnable = [one for one in conversations if one.learned]
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
                cut_share=sum(one.is_cut for one in conversations) / len(conversations),
                lost_scored_share=1.0 - cut.num_scored / max(1, counts[Split.TRAIN].num_scored),
                train=cut,
            )
        )
    prepared = PreparedData(
        path=folder,
        source="",
        eval_source=None,
        format=data_format,
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
    )
    if template_date is not None:
        record_date(tokenizer, template_date)
    _write(prepared, tables, tokenizer)


def _tokenized(
    tokenizer: Any,
    template: ChatTemplate | None,
    examples: Sequence[Example],
    block_size: int,
    problems: Problems,
) -> list[Tokenized]:
    """Tokenize the examples of one split, in order; what cannot be rendered goes to `problems`."""
    passages = [example for example in examples if isinstance(example, Passage)]
    if passages:
        return list(pack(tokenizer, passages, block_size))
    made: list[Tokenized | BadRecord] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        if template is None:
            made += tokenize_completions(tokenizer, [each for each in batch if isinstance(each, Completion)])
            continue
        rendered: list[Rendered] = []
        for example in batch:
            assert isinstance(example, Conversation)
            try:
                rendered += render(template, example)
            except RenderError as error:
                made.append(BadRecord(where=example.where, reason=error.reason, detail=error.detail))
        made += tokenize_chats(tokenizer, rendered, decode_every=_DECODE_EVERY)
    problems.bad += [each for each in made if isinstance(each, BadRecord)]
    return [each for each in made if isinstance(each, Tokenized)]


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
    scored = example.labels != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(scored)]
    return tuple(
        (tokenizer.decode(example.input_ids[start:end].tolist()), bool(scored[start]))
        for start, end in pairwise(edges)
    )


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
