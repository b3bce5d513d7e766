"""Hold out examples for evaluation, by content, so that neither order nor repetition matters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autosft.profiles.dataset.formats import Completion, Conversation, Example, Passage
from autosft.profiles.errors import UserError

#: The maximum size of a held-out part: more would cost each trial time and hardly sharpen the score.
MAX_HELD_OUT = 500
#: The minimum size where the data allows it.
MIN_HELD_OUT = 8
#: With fewer examples, nothing can be held out.
MIN_EXAMPLES = 4

#: The minimum number of passages of a single long document, so that some can be held out.
_NUM_PASSAGES = 50
_MIN_PASSAGE_CHARS = 200
_CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Fold:
    """One of several equal parts of the examples, which is evaluated on while the others are trained on."""

    number: int  # from 1
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitExamples:
    """Examples by use; training examples in the order of the data, the others by rank."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    final: tuple[Example, ...]
    num_duplicates_removed: int  # from training, because the same content is evaluated on


def split_examples(
    examples: Sequence[Example],
    given_eval: Sequence[Example] | None,
    *,
    seed: int,
    eval_share: float,
    final_share: float,
    fold: Fold | None = None,
) -> SplitExamples:
    """Choose evaluation examples by a hash of content and seed, each content once.

    The choice does not depend on the order of the examples.  With `given_eval`, trials are compared on
    exactly these, and only the final part is held out.  With `fold`, they are compared on that part of all
    examples: over all folds, each content is evaluated on exactly once.  No content is in two parts.  Raises
    `UserError` if there are too few examples.
    """
    keys = [_key(example) for example in examples]
    given_keys = {_key(example) for example in given_eval or ()}
    by_key = {key: example for key, example in zip(keys, examples, strict=True) if key not in given_keys}
    if len(by_key) < MIN_EXAMPLES:
        without = ", without those that are evaluated on," if given_keys else ""
        raise UserError(
            f"{len(by_key)} different examples to train on{without} are too few: at least {MIN_EXAMPLES} are "
            "needed, of which some are held out for evaluation."
        )
    ranked = sorted(by_key, key=lambda key: _rank(key, seed))
    num_final = _num_held_out(len(ranked), final_share)
    if fold is None:
        num_eval = 0 if given_eval is not None else _num_held_out(len(ranked), eval_share)
        final_keys, eval_keys = ranked[:num_final], ranked[num_final : num_final + num_eval]
    else:
        eval_keys, others = _part(ranked, fold)
        final_keys = others[:num_final]
    held_out = given_keys.union(final_keys, eval_keys)
    train = tuple(example for key, example in zip(keys, examples, strict=True) if key not in held_out)
    return SplitExamples(
        train=train,
        eval=tuple(given_eval) if given_eval is not None else tuple(by_key[key] for key in eval_keys),
        final=tuple(by_key[key] for key in final_keys),
        num_duplicates_removed=len(examples) - len(train) - len(final_keys) - len(eval_keys),
    )


def parse_fold(text: str) -> Fold:
    """Return the fold that `2/5` names: the second of five.  Raises UserError."""
    found = re.fullmatch(r"\s*([0-9]{1,3})\s*/\s*([0-9]{1,3})\s*", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) or int(found[2]) < 2:
        raise UserError(
            f"--fold {text}: not one of at least two folds.",
            remedy="Write the number of the fold and how many there are: --fold 1/5, then 2/5, and so on.",
        )
    return Fold(int(found[1]), int(found[2]))


def largest_sample(examples: Sequence[Example], limit: int, *, seed: int) -> tuple[Example, ...]:
    """Return at most `limit` examples, chosen by a hash of content and seed, in their order."""
    if len(examples) <= limit:
        return tuple(examples)
    ranks = [_rank(_key(example), seed) for example in examples]
    kept = set(sorted(range(len(examples)), key=ranks.__getitem__)[:limit])
    return tuple(example for position, example in enumerate(examples) if position in kept)


def weighted(examples: Sequence[Example], weights: Sequence[float], *, seed: int) -> tuple[Example, ...]:
    """Repeat the examples of each source by its weight, source by source.

    A weight of 2.25 uses each twice, and a quarter, chosen by a hash of content and seed, once more.
    """
    used: list[Example] = []
    for source, weight in enumerate(weights):
        own = [example for example in examples if example.source == source]
        whole, fraction = divmod(weight, 1.0)
        used += own * int(whole)
        used += largest_sample(own, round(fraction * len(own)), seed=seed) if fraction else ()
    return tuple(used)


def cut_passages(documents: Sequence[Passage], block_size: int) -> list[Passage]:
    """Cut long documents into passages, so that parts of a single file can be held out.

    A passage ends at the end of a line, if there are lines, and is about one block long, or shorter if the
    whole text would give fewer than 50.
    """
    total = sum(len(document.text) for document in documents)
    size = max(_MIN_PASSAGE_CHARS, min(total // _NUM_PASSAGES, block_size * _CHARS_PER_TOKEN))
    passages: list[Passage] = []
    for number, document in enumerate(documents):
        part, start = 0, 0
        while start < len(document.text):
            end = _passage_end(document.text, start + size, size)
            text = document.text[start:end]
            passages.append(replace(document, text=text, document=number, part=part))
            part, start = part + 1, end
    return passages


def _passage_end(text: str, target: int, reach: int) -> int:
    """Return the end of the first line, else of the first word, that ends at or soon after `target`."""
    for separator in ("\n", " "):
        if (found := text.find(separator, target, target + reach)) >= 0:
            return found + 1
    return min(target + reach, len(text))


def _part(ranked: Sequence[str], fold: Fold) -> tuple[list[str], list[str]]:
    """Return the keys of a fold, and the others.  Raises UserError for more folds than there is room for."""
    if len(ranked) < 2 * fold.of:
        raise UserError(
            f"--fold {fold}: {len(ranked)} different examples are too few for {fold.of} folds.",
            remedy=f"Use at most {len(ranked) // 2} folds.",
        )
    first, end = (round(len(ranked) * number / fold.of) for number in (fold.number - 1, fold.number))
    return list(ranked[first:end]), [*ranked[end:], *ranked[:first]]


def _num_held_out(num_examples: int, share: float) -> int:
    """Return the share as a number of examples, within the limits above and at most a quarter."""
    return min(max(round(num_examples * share), MIN_HELD_OUT), MAX_HELD_OUT, num_examples // 4)


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _key(example: Example) -> str:
    """Hash the content of an example, ignoring differences in white space."""
    content: list[object]
    match example:
        case Conversation():
            content = [example.messages, example.tools, example.learned]
        case Completion():
            content = [example.prompt, example.completion]
        case Passage():
            content = [example.text]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(" ".join(text.replace("\\n", " ").split()).encode()).hexdigest()
