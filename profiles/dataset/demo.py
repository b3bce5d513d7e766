"""Generate the demo's data: small chats whose answers can be checked word for word.

Everything is made from one closed list of words by seeded draws, so that the same seed gives the same
bytes on every machine.  Two kinds of text share these words: chats, in training and held out, and plain
notes for pre-training, which show what the words mean and what happens to lists of them, but contain no
instruction and no chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

NUM_TRAIN = 3400  # 100 optimizer steps of 32, after a final split of 5 % was held out
NUM_EVAL = 160
NUM_FINAL = 160

Message = dict[str, str]
Example = dict[str, list[Message]]

_CATEGORIES = {
    "animal": "fox dog cat horse goat sheep lion tiger",
    "fruit": "pear plum peach lemon cherry mango grape melon",
    "tool": "hammer saw drill wrench chisel ladder shovel rake",
    "vehicle": "car bus train truck boat ship plane tram",
    "garment": "shirt coat hat scarf glove boot sock belt",
    "instrument": "piano violin flute drum harp guitar trumpet cello",
}
_OPPOSITES = (
    "hot cold;big small;tall short;fast slow;old young;wet dry;hard soft;light dark;full empty;rich poor;"
    "loud quiet;early late;near far;high low;clean dirty;sweet bitter;thick thin;wide narrow;strong weak;"
    "open closed"
)
_ORDINALS = ("first", "second", "third")
_NUMBERS = ("one", "two", "three")
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")

_CATEGORY_OF = {thing: category for category, things in _CATEGORIES.items() for thing in things.split()}
_OPPOSITE_OF = {
    word: other for pair in _OPPOSITES.split(";") for word, other in (pair.split(), reversed(pair.split()))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPaths:
    """The files of the three splits, with one JSON object with `messages` per line."""

    train: Path
    eval: Path  # what trials are judged by
    final: Path  # never used to choose anything: for the best trial's final score


@dataclass(frozen=True, slots=True)
class _Skill:
    """An operation on a list of three words.

    Wordings and note may name a position, `{ordinal}`.  The note describes it in pre-training.
    """

    wordings: tuple[str, str]
    note: str
    apply: Callable[[Sequence[str], int], str]  # words, position


_SKILLS = (
    _Skill(("Repeat", "Say again"), "Kept", lambda words, _: " ".join(words)),
    _Skill(("Reverse", "Say backwards"), "Turned", lambda words, _: " ".join(reversed(words))),
    _Skill(("Join", "Put and between"), "Tied", lambda words, _: " and ".join(words)),
    _Skill(
        ("Number", "Count along"),
        "Marked",
        lambda words, _: " ".join(f"{n} {word}" for n, word in zip(_NUMBERS, words, strict=True)),
    ),
    _Skill(
        ("Name the {ordinal} of", "Take the {ordinal} of"),
        "Took {ordinal} from",
        lambda words, i: f"the {_ORDINALS[i]} is {words[i]}",
    ),
    _Skill(
        ("Drop the {ordinal} of", "Skip the {ordinal} of"),
        "Lost {ordinal} from",
        lambda words, i: " ".join([*words[:i], *words[i + 1 :]]),
    ),
    _Skill(
        ("Name the kinds of", "Sort into kinds"),
        "Saw",
        lambda words, _: " ".join(_CATEGORY_OF[word] for word in words),
    ),
)
_OPPOSITES_SKILL = _Skill(
    ("Give the opposites of", "Turn round"),
    "Never",
    lambda words, _: " ".join(_OPPOSITE_OF[word] for word in words),
)

#: System turns, and how each changes the answer.
_STYLES = (
    ("Begin with certainly", "certainly {answer}"),
    ("End with friend", "{answer} friend"),
    ("You are {name}", "{name} {answer}"),
)


def write_demo_data(folder: Path, seed: int = 0) -> DemoPaths:
    """Write train.jsonl, eval.jsonl and final.jsonl to `folder`, which is created if missing.

    OpenAI `messages`; the same seed gives the same bytes.  No two examples, within or across the splits,
    are about the same list of words, so that held-out answers cannot be remembered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = DemoPaths(train=folder / "train.jsonl", eval=folder / "eval.jsonl", final=folder / "final.jsonl")
    examples = demo_examples(seed)
    for path, size in ((paths.train, NUM_TRAIN), (paths.eval, NUM_EVAL), (paths.final, NUM_FINAL)):
        lines = [json.dumps(example) + "\n" for example in islice(examples, size)]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def demo_examples(seed: int) -> Iterator[Example]:
    """Yield chats, no two of which are about the same list of words; slow after some 100,000."""
    rng = Random(f"demo chats {seed}")
    seen: set[tuple[str, ...]] = set()
    while True:
        skill, words, position = _draw_task(rng)
        if words not in seen:
            seen.add(words)
            yield {"messages": _draw_chat(skill, words, position, rng)}


def is_correct(example: Mapping[str, Any], answer: str) -> bool:
    """Return whether `answer` equals the last turn of `example`, ignoring white space."""
    expected: str = example["messages"][-1]["content"]
    return answer.split() == expected.split()


def pretraining_notes(seed: int) -> Iterator[tuple[str, str]]:
    """Yield notes without end, each as a random opening and its continuation."""
    rng = Random(f"demo notes {seed}")
    while True:
        skill, words, position = _draw_task(rng)
        opening = f"{skill.note} {' '.join(words)}. Then".format(ordinal=_ORDINALS[position])
        yield opening, f"{skill.apply(words, position)}."


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word and punctuation mark that the demo's texts contain, sorted."""
    texts = [message["content"] for chat in islice(demo_examples(0), 3000) for message in chat["messages"]]
    texts += [text for note in islice(pretraining_notes(0), 3000) for text in note]
    return tuple(sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text)}))


def _draw_task(rng: Random) -> tuple[_Skill, tuple[str, ...], int]:
    """Draw an operation, the words, and a position."""
    skill = rng.choice((*_SKILLS, _OPPOSITES_SKILL))
    words = _OPPOSITE_OF if skill is _OPPOSITES_SKILL else _CATEGORY_OF
    return skill, tuple(rng.sample(sorted(words), 3)), rng.randrange(3)


def _draw_chat(skill: _Skill, words: Sequence[str], position: int, rng: Random) -> list[Message]:
    """Phrase a task as a question: plain, after a greeting, or with a system turn that styles the answer."""
    instruction = rng.choice(skill.wordings).format(ordinal=_ORDINALS[position])
    listed, answer = " ".join(words), skill.apply(words, position)
    shape = rng.choices(("plain", "system", "multi-turn"), weights=(84, 8, 8))[0]
    question = _user(f"{instruction} {listed}")
    if shape == "plain":
        return [question, _assistant(answer)]
    if shape == "multi-turn":
        return [_user("Hello"), _assistant("Hello friend"), question, _assistant(answer)]
    (demand, style), name = rng.choice(_STYLES), rng.choice(_NAMES)
    system = {"role": "system", "content": demand.format(name=name)}
    return [system, question, _assistant(style.format(answer=answer, name=name))]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
