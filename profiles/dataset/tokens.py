"""Tokenize rendered text into ids and labels, check the mask, and pack plain text into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autosft.profiles.dataset.chat import Rendered
from autosft.profiles.dataset.encoding import Encoded, Ids, encode
from autosft.profiles.dataset.formats import Completion, Passage
from autosft.profiles.dataset.prepared import IGNORED
from autosft.profiles.dataset.problems import MASK_FAILED, BadRecord
from autosft.profiles.dataset.template import adds_bos

_MAX_DECODED = 100_000  # characters: decoding more takes longer than tokenizing it did


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """One training example in tokens."""

    input_ids: Ids
    labels: Ids  # of the same length; IGNORED where not scored
    num_turns: int
    num_lost: int = 0  # characters of the text, other than space, that no token stands for


def tokenize_chats(
    tokenizer: Any, batch: Sequence[Rendered], *, decode_every: int
) -> list[Tokenized | BadRecord]:
    """Tokenize rendered conversations with labels on their answers, in order, and check each mask.

    For every example: some tokens are scored and some are not, each answer is in the scored text, and each
    turn of the context in the rest.  For every `decode_every`-th example, the scored tokens are decoded and
    compared.
    """
    made: list[Tokenized | BadRecord] = []
    encodings = encode(tokenizer, [rendered.text for rendered in batch])
    for number, (rendered, encoded) in enumerate(zip(batch, encodings, strict=True)):
        ranges = [found for span in rendered.spans if (found := encoded.token_range(*span))]
        problem = _mask_problem(rendered, encoded, ranges)
        if problem is None and number % decode_every == 0 and len(rendered.text) <= _MAX_DECODED:
            problem = _decoding_problem(tokenizer, rendered, encoded.ids, ranges)
        if problem is not None:
            made.append(BadRecord(where=rendered.where, reason=MASK_FAILED, detail=problem))
            continue
        labels = np.full_like(encoded.ids, IGNORED)
        for first, end in ranges:
            labels[first:end] = encoded.ids[first:end]
        made.append(
            Tokenized(
                input_ids=encoded.ids,
                labels=labels,
                num_turns=rendered.num_turns,
                num_lost=encoded.num_lost(rendered.text),
            )
        )
    return made


def tokenize_completions(tokenizer: Any, batch: Sequence[Completion]) -> list[Tokenized]:
    """Tokenize prompts with their completions, which are scored together with an end-of-sequence token.

    Both are tokenized as one text, so that the completion's first word gets its tokens within a text.  If a
    token would span both, they are tokenized separately: the model will be given the prompt alone.
    """
    before = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made = []
    encodings = encode(tokenizer, [pair.prompt + pair.completion for pair in batch])
    for pair, encoded in zip(batch, encodings, strict=True):
        boundary = len(pair.prompt)
        found = encoded.token_range(boundary, boundary + len(pair.completion))
        if found and not pair.prompt[encoded.starts[found[0]] :].strip():
            prompt, completion = encoded.ids[: found[0]], encoded.ids[found[0] :]
        else:
            prompt, completion = (part.ids for part in encode(tokenizer, [pair.prompt, pair.completion]))
        ids = np.array([*before, *prompt, *completion, *after], dtype=np.int32)
        labels = ids.copy()
        labels[: len(before) + len(prompt)] = IGNORED
        num_lost = encoded.num_lost(pair.prompt + pair.completion)
        made.append(Tokenized(input_ids=ids, labels=labels, num_turns=2, num_lost=num_lost))
    return made


def pack(tokenizer: Any, passages: Iterable[Passage], block_size: int) -> Iterator[Tokenized]:
    """Pack plain text into blocks of `block_size` tokens, all scored; the last block may be shorter.

    An end-of-sequence token marks where the text does not continue: after a document, or where the next part
    is not in this split.  Passages are tokenized one by one: a tokenizer that adds a space before every text
    (Llama 2's) adds one before each passage too.
    """
    rest = np.empty(0, dtype=np.int32)
    for ids in _text_tokens(tokenizer, list(passages)):
        rest = np.concatenate([rest, ids])
        whole = len(rest) - len(rest) % block_size
        for start in range(0, whole, block_size):
            block = rest[start : start + block_size]
            yield Tokenized(input_ids=block, labels=block, num_turns=1)
        rest = rest[whole:]
    if len(rest) > 1:  # a single token predicts nothing
        yield Tokenized(input_ids=rest, labels=rest, num_turns=1)


def not_known(tokenizer: Any, model: str, examples: Sequence[Tokenized]) -> list[str]:
    """Return notes on text that the tokenizer has no tokens for, and a model so cannot learn."""
    said = []
    unknown = tokenizer.unk_token
    if unknown is not None and unknown not in (tokenizer.eos_token, tokenizer.bos_token):
        num_unknown = sum(int(np.sum(each.input_ids == tokenizer.unk_token_id)) for each in examples)
        num_tokens = sum(len(each.input_ids) for each in examples)
        if num_unknown:
            said.append(
                f"{num_unknown:,} of {num_tokens:,} tokens are {unknown}: the tokenizer of {model} has none "
                "for these words or characters"
            )
    if num_lost := sum(each.num_lost for each in examples):
        said.append(
            f"{num_lost:,} characters are lost: the tokenizer of {model} has no tokens for them, and none "
            "for what is unknown"
        )
    return said


def _text_tokens(tokenizer: Any, passages: Sequence[Passage]) -> Iterator[Ids]:
    start, end = [tokenizer.bos_token_id] if adds_bos(tokenizer) else [], [tokenizer.eos_token_id]
    for begin in range(0, len(passages), 1000):
        batch = passages[begin : begin + 1000]
        texts = [passage.text for passage in batch]
        for number, encoded in enumerate(encode(tokenizer, texts), start=begin):
            goes_on = number + 1 < len(passages) and _continues(passages[number], passages[number + 1])
            continued = number > 0 and _continues(passages[number - 1], passages[number])
            # Do not repeat tokens that the text contains itself.
            before = [] if continued or encoded.ids[:1].tolist() == start else start
            after = [] if goes_on or encoded.ids[-1:].tolist() == [tokenizer.eos_token_id] else end
            yield np.array([*before, *encoded.ids, *after], dtype=np.int32)


def _continues(passage: Passage, following: Passage) -> bool:
    return (passage.document, passage.part + 1) == (following.document, following.part)


def _mask_problem(rendered: Rendered, encoded: Encoded, ranges: Sequence[tuple[int, int]]) -> str | None:
    """Return what is wrong with an example's mask, by the characters that its scored tokens cover."""
    num_scored = sum(end - first for first, end in ranges)
    if num_scored == 0:
        return "no token is scored"
    if num_scored == len(encoded.ids):
        return "every token is scored, the question too"
    scored, rest, at = [], [], 0
    for first, end in ranges:
        start, stop = int(encoded.starts[first]), int(encoded.ends[end - 1])
        rest.append(rendered.text[at:start])
        scored.append(rendered.text[start:stop])
        at = stop
    rest.append(rendered.text[at:])
    learned, ignored = "\0".join(scored), "\0".join(rest)
    for answer in rendered.answers:
        if answer not in learned:
            return f"the answer {_shortened(answer)} is not scored as a whole"
    for part in rendered.context:
        # Text that the template rewrites, such as JSON in JSON, cannot be searched for.
        if part not in ignored and part in rendered.text:
            return f"{_shortened(part)} is scored, but is no answer"
    return None


def _decoding_problem(
    tokenizer: Any, rendered: Rendered, ids: Ids, ranges: Sequence[tuple[int, int]]
) -> str | None:
    """Decode the scored tokens and search for the answers, ignoring spaces, which decoders may change."""
    if not _equal_without_whitespace(rendered.text, tokenizer.decode(ids.tolist())):
        return None  # the tokenizer itself changes text (lower case, say): nothing to compare
    learned = "".join("".join(tokenizer.decode(ids[first:end].tolist()).split()) for first, end in ranges)
    for answer in rendered.answers:
        if "".join(answer.split()) not in learned:
            return f"the scored tokens do not decode to the answer {_shortened(answer)}"
    return None


def _equal_without_whitespace(first: str, second: str) -> bool:
    return "".join(first.split()) == "".join(second.split())


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
