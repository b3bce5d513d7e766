"""Turns rendered text into token ids and labels, checks the mask, and packs plain text into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autosft.profiles.dataset.chat import Rendered
from autosft.profiles.dataset.formats import Completion, Passage
from autosft.profiles.dataset.prepared import IGNORED
from autosft.profiles.dataset.problems import MASK_FAILED, BadRecord
from autosft.profiles.dataset.template import adds_bos

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """One training example in tokens."""

    input_ids: Ids
    labels: Ids  # of the same length; IGNORED where not scored
    num_turns: int


def tokenize_chats(
    tokenizer: Any, batch: Sequence[Rendered], *, decode_every: int
) -> list[Tokenized | BadRecord]:
    """Tokenize rendered conversations with labels on their answers, in order, and check each mask.

    Checked on every example: something is scored and something is not, each answer stands in the scored
    text and each turn of the context in the rest.  Of every `decode_every`-th one the scored tokens are
    decoded and compared as well.
    """
    encodings = _encode(tokenizer, [rendered.text for rendered in batch])
    made: list[Tokenized | BadRecord] = []
    for number, (rendered, encoding) in enumerate(zip(batch, encodings, strict=True)):
        ranges = [found for span in rendered.spans if (found := _token_range(encoding, *span))]
        problem = _mask_problem(rendered, encoding, ranges)
        if problem is None and number % decode_every == 0:
            problem = _decoding_problem(tokenizer, rendered, encoding.ids, ranges)
        if problem is not None:
            made.append(BadRecord(where=rendered.where, reason=MASK_FAILED, detail=problem))
            continue
        ids = np.array(encoding.ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORED)
        for first, end in ranges:
            labels[first:end] = ids[first:end]
        made.append(Tokenized(input_ids=ids, labels=labels, num_turns=rendered.num_turns))
    return made


def tokenize_completions(tokenizer: Any, batch: Sequence[Completion]) -> list[Tokenized]:
    """Tokenize prompts with their completions, which are scored together with an end-of-sequence token.

    Both are tokenized as one text, so that the completion's first word is written as within a text.  Where
    that gives a token with letters of both, they are tokenized apart: the model will be given the prompt
    alone.
    """
    before = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made = []
    for pair, encoding in zip(
        batch, _encode(tokenizer, [pair.prompt + pair.completion for pair in batch]), strict=True
    ):
        boundary = len(pair.prompt)
        found = _token_range(encoding, boundary, boundary + len(pair.completion))
        if found and not pair.prompt[encoding.token_to_chars(found[0])[0] :].strip():
            prompt, completion = encoding.ids[: found[0]], encoding.ids[found[0] :]
        else:
            prompt, completion = (part.ids for part in _encode(tokenizer, [pair.prompt, pair.completion]))
        ids = np.array([*before, *prompt, *completion, *after], dtype=np.int32)
        labels = ids.copy()
        labels[: len(before) + len(prompt)] = IGNORED
        made.append(Tokenized(input_ids=ids, labels=labels, num_turns=2))
    return made


def pack(tokenizer: Any, passages: Iterable[Passage], block_size: int) -> Iterator[Tokenized]:
    """Pack plain text into blocks of `block_size` tokens, all scored; the last block may be shorter.

    An end-of-sequence token stands where the text does not go on: after a document, or where the part
    that follows is not in this split.  Passages are tokenized one by one: a tokenizer that puts a space
    before every text (Llama 2's) puts one before each passage too.
    """
    rest = np.empty(0, dtype=np.int32)
    for ids in _text_tokens(tokenizer, list(passages)):
        rest = np.concatenate([rest, ids])
        whole = len(rest) - len(rest) % block_size
        for start in range(0, whole, block_size):
            block = rest[start : start + block_size]
            yield Tokenized(input_ids=block, labels=block, num_turns=1)
        rest = rest[whole:]
    if len(rest) > 1:  # one token alone predicts nothing
        yield Tokenized(input_ids=rest, labels=rest, num_turns=1)


def _text_tokens(tokenizer: Any, passages: Sequence[Passage]) -> Iterator[Ids]:
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for begin in range(0, len(passages), 1000):
        batch = passages[begin : begin + 1000]
        for number, encoding in enumerate(
            _encode(tokenizer, [passage.text for passage in batch]), start=begin
        ):
            goes_on = number + 1 < len(passages) and _continues(passages[number], passages[number + 1])
            continued = number > 0 and _continues(passages[number - 1], passages[number])
            end = [] if goes_on else [tokenizer.eos_token_id]
            yield np.array(([] if continued else start) + encoding.ids + end, dtype=np.int32)


def _continues(one: Passage, other: Passage) -> bool:
    return (one.document, one.part + 1) == (other.document, other.part)


def _encode(tokenizer: Any, texts: Sequence[str]) -> Sequence[Any]:
    """Return the `tokenizers.Encoding` of each text."""
    if not texts:
        return []
    # Not verbose: a text longer than the model's longest position is cut later, and reported then.
    encoded: Sequence[Any] = tokenizer(list(texts), add_special_tokens=False, verbose=False).encodings
    return encoded


def _token_range(encoding: Any, start: int, end: int) -> tuple[int, int] | None:
    """Return the first token and the one after the last that cover the characters start..end-1."""
    first = next(
        (token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None), None
    )
    last = next(
        (token for at in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(at)) is not None),
        None,
    )
    if first is None or last is None:
        return None
    # A character of several tokens, such as an emoji in bytes, is found at the first of them.
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < end:
        last += 1
    return first, last + 1


def _mask_problem(rendered: Rendered, encoding: Any, ranges: Sequence[tuple[int, int]]) -> str | None:
    """Say what is wrong with the mask of an example, judged by the characters its scored tokens cover."""
    num_scored = sum(end - first for first, end in ranges)
    if num_scored == 0:
        return "no token is scored"
    if num_scored == len(encoding):
        return "every token is scored, the question too"
    scored, rest, at = [], [], 0
    for first, end in ranges:
        start, stop = encoding.token_to_chars(first)[0], encoding.token_to_chars(end - 1)[1]
        rest.append(rendered.text[at:start])
        scored.append(rendered.text[start:stop])
        at = stop
    rest.append(rendered.text[at:])
    learned, ignored = "\0".join(scored), "\0".join(rest)
    for answer in rendered.answers:
        if answer not in learned:
            return f"the answer {_shortened(answer)} is not scored as a whole"
    for part in rendered.context:
        # Text that the template shows in other words, such as JSON in JSON, cannot be looked for.
        if part not in ignored and part in rendered.text:
            return f"{_shortened(part)} is scored, but is no answer"
    return None


def _decoding_problem(
    tokenizer: Any, rendered: Rendered, ids: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> str | None:
    """Decode the scored tokens and look for the answers in them; spaces aside, which decoders may change."""
    if not _same_but_space(rendered.text, tokenizer.decode(ids)):
        return None  # the tokenizer itself changes text (lower case, say): nothing to compare
    learned = "".join("".join(tokenizer.decode(ids[first:end]).split()) for first, end in ranges)
    for answer in rendered.answers:
        if "".join(answer.split()) not in learned:
            return f"the scored tokens do not decode to the answer {_shortened(answer)}"
    return None


def _same_but_space(one: str, other: str) -> bool:
    return "".join(one.split()) == "".join(other.split())


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
