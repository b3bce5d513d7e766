"""The embedded demo's data: small chats whose answers can be checked word for word.

Everything is made from one closed list of words by seeded draws, so that the same seed gives the same
bytes on every machine.  There are three kinds of text over these words: training chats, held-out chats
whose instructions never occur in training, and plain prose for pre-training, which shows what the words
mean and that lists get repeated or turned round, but contains no instruction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

#: Changes whenever the text changes: caches made from older text are then left alone.
VERSION = 1
NUM_TRAIN = 4800  # 150 optimizer steps of 32
NUM_EVAL = 160
NUM_FINAL = 160

Message = dict[str, str]
Example = dict[str, list[Message]]

_CATEGORIES = {
    "animal": "fox dog cat horse goat sheep lion tiger bear wolf mouse rabbit camel zebra otter beaver",
    "fruit": "pear plum peach lemon cherry mango grape melon fig lime banana papaya olive berry quince date",
    "tool": "hammer saw drill wrench chisel ladder shovel rake axe knife needle brush pliers file anvil spade",
    "vehicle": "car bus train truck boat ship plane tram bike sled canoe ferry wagon van rocket taxi",
    "garment": "shirt coat hat scarf glove boot sock belt jacket skirt vest cap robe sandal tie dress",
    "instrument": "piano violin flute drum harp guitar trumpet cello organ banjo oboe tuba horn lute bell gong",
}
_OPPOSITES = (
    "hot cold;big small;tall short;fast slow;old young;wet dry;hard soft;light dark;full empty;rich poor;"
    "loud quiet;early late;near far;high low;clean dirty;sweet bitter;thick thin;wide narrow;strong weak;"
    "open closed"
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")

_WORDS_BY_CATEGORY = {category: words.split() for category, words in _CATEGORIES.items()}
_THINGS = [thing for words in _WORDS_BY_CATEGORY.values() for thing in words]
_OPPOSITE_OF = {
    word: other for pair in _OPPOSITES.split(";") for word, other in (pair.split(), reversed(pair.split()))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPaths:
    """Where `write_demo_data` put the three splits, one JSON object with `messages` a line."""

    train: Path
    eval: Path  # what trials are judged by
    final: Path  # never used to choose anything: for the last word on the best trial


@dataclass(frozen=True, slots=True)
class _Skill:
    """Something that can be asked of a list of words, in several wordings; `{}` stands for the list."""

    wordings: tuple[str, ...]
    answer: Callable[[Sequence[str], int], str]  # of the list and of a position in it


_SKILLS = (
    _Skill(("Repeat: {}", "Say again: {}"), lambda words, _: " ".join(words)),
    _Skill(("Say backwards: {}", "Reverse the order: {}"), lambda words, _: " ".join(reversed(words))),
    _Skill(("Join with and: {}", "Put and between: {}"), lambda words, _: " and ".join(words)),
    _Skill(
        ("How many words are here? {}", "Count the words: {}"),
        lambda words, _: f"There are {_NUMBERS[len(words) - 1]} words.",
    ),
    _Skill(
        ("Number the words: {}", "Put a number before each word: {}"),
        lambda words, _: " ".join(f"{number} {word}" for number, word in zip(_NUMBERS, words, strict=False)),
    ),
    _Skill(
        ("Which is the {ordinal} word? {}", "Name the {ordinal} of these: {}"),
        lambda words, i: f"The {_ORDINALS[i]} word is {words[i]}.",
    ),
    _Skill(
        ("Leave out the {ordinal} word: {}", "Drop the {ordinal} of these: {}"),
        lambda words, i: " ".join([*words[:i], *words[i + 1 :]]),
    ),
    _Skill(
        ("Say the {ordinal} word twice: {}", "Double the {ordinal} of these: {}"),
        lambda words, i: " ".join([*words[: i + 1], *words[i:]]),
    ),
)

#: A system turn and what it makes of an answer.
_STYLES = (
    ("Begin every answer with certainly.", "certainly {answer}"),
    ("End every answer with friend.", "{answer} friend"),
    ("Your name is {name}. Begin every answer with your name.", "{name} {answer}"),
)


def write_demo_data(folder: Path, seed: int = 0) -> DemoPaths:
    """Write train.jsonl, eval.jsonl and final.jsonl below `folder`, which is made when missing.

    OpenAI `messages`; the same seed gives the same bytes.  No two examples, within or across the splits,
    ask the same: a list of words together with what is wanted of it occurs once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = DemoPaths(train=folder / "train.jsonl", eval=folder / "eval.jsonl", final=folder / "final.jsonl")
    examples = demo_examples(seed)
    for path, size in ((paths.train, NUM_TRAIN), (paths.eval, NUM_EVAL), (paths.final, NUM_FINAL)):
        lines = [json.dumps(next(examples)) + "\n" for _ in range(size)]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def demo_examples(seed: int) -> Iterator[Example]:
    """Yield chats without end, no two of which put the same instruction."""
    rng = Random(f"demo chats {seed}")  # noqa: S311
    seen: set[tuple[str, ...]] = set()
    while True:
        example = _draw_example(rng)
        asked = tuple(message["content"] for message in example["messages"] if message["role"] == "user")
        if asked not in seen:
            seen.add(asked)
            yield example


def is_correct(example: Mapping[str, Any], answer: str) -> bool:
    """Whether `answer` is, word for word, the last assistant turn of `example`; only white space is forgiven."""
    return answer.split() == example["messages"][-1]["content"].split()


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word and punctuation mark that the demo's texts contain, sorted."""
    chats, prose = demo_examples(0), pretraining_text(0)
    texts = [message["content"] for _ in range(3000) for message in next(chats)["messages"]]
    texts += [next(prose) for _ in range(3000)]
    return tuple(sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text)}))


def _draw_example(rng: Random) -> Example:
    shape = rng.random()
    if shape < 0.7:
        turns = [_draw_question(rng)]
    elif shape < 0.85:
        turns = [_draw_question(rng), _draw_question(rng)]
    else:  # the list is given first and asked about later
        words = _draw_list(rng)
        told = " ".join(words)
        turns = [(f"My list is: {told}", f"Your list is {told}."), _ask_about(words, "my list", rng)]
    messages = []
    if rng.random() < 0.2:
        (instruction, style), name = rng.choice(_STYLES), rng.choice(_NAMES)
        messages.append({"role": "system", "content": instruction.format(name=name)})
        turns = [(question, style.format(answer=answer, name=name)) for question, answer in turns]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _draw_question(rng: Random) -> tuple[str, str]:
    """Draw an instruction and its answer."""
    kind = rng.random()
    if kind < 0.12:
        words = rng.sample(sorted(_OPPOSITE_OF), rng.randint(2, 3))
        wording = rng.choice(("Give the opposite of each: {}", "Turn into opposites: {}"))
        return wording.format(" ".join(words)), " ".join(_OPPOSITE_OF[word] for word in words)
    if kind < 0.24:
        categories = rng.sample(sorted(_WORDS_BY_CATEGORY), rng.randint(3, 4))
        words = [rng.choice(_WORDS_BY_CATEGORY[category]) for category in categories]
        wanted = rng.randrange(len(words))
        wording = rng.choice(("Which of these is a kind of {}? {}", "Find the {} among these: {}"))
        question = wording.format(categories[wanted], " ".join(words))
        return question, f"The {categories[wanted]} is {words[wanted]}."
    words = _draw_list(rng)
    return _ask_about(words, " ".join(words), rng)


def _draw_list(rng: Random) -> list[str]:
    return rng.sample(_THINGS, rng.randint(3, 5))


def _ask_about(words: Sequence[str], named: str, rng: Random) -> tuple[str, str]:
    """Ask something about `words`, which the instruction calls `named`."""
    skill, position = rng.choice(_SKILLS), rng.randrange(len(words))
    wording = rng.choice(skill.wordings)
    return wording.format(named, ordinal=_ORDINALS[position]), skill.answer(words, position)


def pretraining_text(seed: int) -> Iterator[str]:
    """Yield sentences of plain prose over the same words without end."""
    rng = Random(f"demo prose {seed}")  # noqa: S311
    while True:
        yield _draw_sentence(rng)


def _draw_sentence(rng: Random) -> str:
    name, words = rng.choice(_NAMES), _draw_list(rng)
    listed, backwards = " ".join(words), " ".join(reversed(words))
    position = rng.randrange(len(words))
    category = rng.choice(sorted(_WORDS_BY_CATEGORY))
    thing, other = rng.sample(_WORDS_BY_CATEGORY[category], 2)
    quality = rng.choice(sorted(_OPPOSITE_OF))
    opposite = _OPPOSITE_OF[quality]
    return rng.choice(
        (
            f"A {thing} is a kind of {category}.",
            f"The {category} of {name} is the {thing} and not the {other}.",
            f"The {thing} is {quality} and the {other} is {opposite}.",
            f"What is not {quality} is {opposite}.",
            f"{name} saw {listed} and then saw {listed} again.",
            f"{name} bought {listed}. Later {name} sold {listed}.",
            f"{name} walked past {listed} and came back past {backwards}.",
            f"{name} has {_NUMBERS[len(words) - 1]} words: {listed}.",
            f"In {listed} the {_ORDINALS[position]} is {words[position]}.",
            f"{name} wrote {listed} and then lost the {_ORDINALS[position]}: "
            f"{' '.join([*words[:position], *words[position + 1 :]])}.",
            f"{name} has " + " ".join(f"{n} {w}" for n, w in zip(_NUMBERS, words, strict=False)) + ".",
            f"{name} likes {' and '.join(words)}.",
        )
    )
