"""Encode texts as token ids with the characters that each covers, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

#: Longer texts are tokenized in windows: the tokenizers library takes some 200 bytes per character.
WINDOW = 100_000
#: Characters by which consecutive windows overlap, to find where both agree.
OVERLAP = 4_000
#: The number of consecutive tokens on which two windows have to agree.
_AGREED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one text."""

    ids: Ids
    starts: npt.NDArray[np.int64]  # (tokens,) first character of each
    ends: npt.NDArray[np.int64]  # (tokens,) the character after the last

    def token_range(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the first token and the one after the last that cover the characters start..end-1."""
        covering = np.flatnonzero((self.starts < end) & (self.ends > start) & (self.ends > self.starts))
        if not len(covering):
            return None
        last = int(covering[-1])
        # A character of several tokens, such as an emoji in bytes, may be given to the first of them.
        while last + 1 < len(self.ids) and self.starts[last + 1] < end:
            last += 1
        return int(covering[0]), last + 1

    def num_lost(self, text: str) -> int:
        """Return how many characters of the text, other than space, no token covers."""
        reached = np.maximum.accumulate(np.concatenate([[0], self.ends]))
        starts = np.append(self.starts, len(text))
        gaps = np.flatnonzero(starts > reached)
        return sum(len("".join(text[reached[at] : starts[at]].split())) for at in gaps)

    def part(self, first: int, end: int | None = None) -> Encoded:
        return Encoded(self.ids[first:end], self.starts[first:end], self.ends[first:end])


def encode(
    tokenizer: Any, texts: Sequence[str], *, window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[Encoded]:
    """Yield the tokens of each text, without special tokens around it."""
    short = [text for text in texts if len(text) <= window]
    encoded = iter(_encode(tokenizer, short))
    for text in texts:
        yield _of(next(encoded)) if len(text) <= window else _encode_long(tokenizer, text, window, overlap)


def _encode(tokenizer: Any, texts: Sequence[str]) -> Sequence[Any]:
    """Return the `tokenizers.Encoding` of each text."""
    if not texts:
        return []
    # Not verbose: a text longer than the model's longest position is cut later, and reported then.
    encodings: Sequence[Any] = tokenizer(list(texts), add_special_tokens=False, verbose=False).encodings
    return encodings


def _of(encoding: Any, shift: int = 0) -> Encoded:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + shift
    return Encoded(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])


def _encode_long(tokenizer: Any, text: str, window: int, overlap: int) -> Encoded:
    """Tokenize a long text in overlapping windows that are joined where they agree.

    Tokenizers look at most a word or a line ahead, so that the tokens in the middle of the overlap are those
    of the whole text.  If two windows never agree (one endless word), the whole text is tokenized at once.
    """
    parts: list[Encoded] = []
    for start in range(0, len(text) - overlap, window - overlap):
        found = _of(_encode(tokenizer, [text[start : start + window]])[0], start)
        if parts:
            joint = _joint(parts[-1], found, start + overlap // 2)
            if joint is None:
                return _of(_encode(tokenizer, [text])[0])
            parts[-1], found = parts[-1].part(0, joint[0]), found.part(joint[1])
        parts.append(found)
    columns = ([getattr(part, name) for part in parts] for name in ("ids", "starts", "ends"))
    return Encoded(*map(np.concatenate, columns))


def _joint(left: Encoded, right: Encoded, middle: int) -> tuple[int, int] | None:
    """Return positions in two windows, after character `middle`, from which on their tokens are equal."""
    first = int(np.searchsorted(left.starts, middle))
    at = {int(start): position for position, start in reversed(list(enumerate(right.starts[: OVERLAP * 2])))}
    for position in range(first, len(left.ids) - _AGREED_TOKENS):
        other = at.get(int(left.starts[position]))
        if other is None:
            continue
        here, there = (
            part.part(begin, begin + _AGREED_TOKENS) for part, begin in ((left, position), (right, other))
        )
        if np.array_equal(here.ids, there.ids) and np.array_equal(here.starts, there.starts):
            return position, other
    return None
