"""Marks in data that say what is to be learned: of turns, of their parts, and of whole records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from autosft.profiles.dataset.columns import LEARNED, SPLIT, SPLITS
from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.problems import BadRecordError, brief, brief_list
from autosft.profiles.dataset.split_names import split_of

MARKED = "answers are marked as not to be learned"
NOT_LEARNED = MARKED + " (by {}): they are read only"
ONLY_ANSWERS = "turns that are no answers are marked to be learned: they are read only"


def is_turn_learned(
    turn: Mapping[str, Any], content: object, role: str, number: int, found: set[str]
) -> bool:
    """Return whether a turn is learned, by its own marks or those of its parts."""
    marks = marks_of(turn, number)
    if isinstance(content, list):
        parts = [_part_mark(part, number) for part in content if isinstance(part, Mapping)]
        if len(set(parts)) > 1:
            raise BadRecordError("a turn is to be learned in parts", f"turn {number}")
        if parts and parts[0] is not None:
            marks["its parts"] = parts[0]
    if role != "assistant":
        if any(marks.values()):
            found.add(ONLY_ANSWERS)
        return False
    for key, value in turn.items():
        if _is_unclear(key, value):
            raise BadRecordError(
                "a turn is marked in a way that cannot be followed",
                f"turn {number}: {key} {brief(value, 40)}; weight 0 or train false would say it",
            )
    against = [key for key, mark in marks.items() if not mark]
    if against:
        found.add(NOT_LEARNED.format(brief_list(against)))
    return not against


def _part_mark(part: Mapping[str, Any], number: int) -> bool | None:
    marks = marks_of(part, number)
    return all(marks.values()) if marks else None


def marks_of(turn: Mapping[str, Any], number: int) -> dict[str, bool]:
    """Return the keys that say whether a turn or a part of one is learned, and what they say.

    Keys within an object of a turn (`metadata`, `extra`) count if they have such a name and say yes or no.
    """
    marks = {}
    for key, value in turn.items():
        name = _plain(key)
        if value is not None and name in FLAGS:
            marks[key] = flag(value, f"turn {number}: {key}")
        elif value is not None and name in FLAGS_AGAINST:
            marks[key] = not flag(value, f"turn {number}: {key}")
        elif isinstance(value, Mapping) and key not in _NO_NOTES:
            marks |= {
                f"{key}.{inner}": _plain(inner) in FLAGS if said else _plain(inner) in FLAGS_AGAINST
                for inner, said in value.items()
                if _plain(inner) in FLAGS | FLAGS_AGAINST and said in (0, 1)
            }
    return marks


def _is_unclear(key: object, value: object) -> bool:
    """Return whether a key of a turn speaks of what is learned in a way that is not known."""
    if key in UNCLEAR:
        return value not in (None, [], {}, "")
    name = _plain(key)
    is_known = name in FLAGS | FLAGS_AGAINST
    return not is_known and isinstance(value, bool | list) and value != [] and bool(_ABOUT.search(name))


def flag(value: object, what: str) -> bool:
    """Return 0, 1, true, false, or their text, as bool.  Raises `BadRecordError` for other values."""
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise BadRecordError("a weight that is neither 0 nor 1", f"{what} is {brief(repr(value), 40)}")


def why_left_out(fields: Mapping[str, Any], *, is_text: bool, is_evaluated: bool) -> str | None:
    """Return why a record is marked as not to be learned, else None.

    `is_text`: it is plain text, which has no answers.  Raises `BadRecordError` for weights in between, and
    for columns that say which turns are learned in a way that is not known.
    """
    for name, value in fields.items():
        if is_record_mark(name, value, is_text=is_text):
            is_learned = flag(value, f"its {name}") is not (_plain(name) in FLAGS_AGAINST)
            if not is_learned:
                return f"their column {name} says that they are not to be learned"
        elif not is_evaluated and _is_held_out(name, value):
            return f"their column {name} says that they are held out"
        elif not is_text and _TURNS_CHOSEN.fullmatch(_plain(name)) and _is_choice(value):
            raise BadRecordError(
                "a column says what is learned in a way that cannot be followed",
                f"{name} {brief(value, 40)}; weight 0 or train false in a turn would say it",
            )
    for name in () if is_evaluated else SPLITS:
        split = fields.get(name)
        if not isinstance(split, str) or not (name == SPLIT or split.isalpha()):
            continue
        if split_of(split) in ("validation", "test"):
            return f"their column {name} says {brief(split, 20)}"
    return None


def _is_choice(value: object) -> bool:
    """Return whether a value says yes, or lists numbers: text in a column of such a name is content."""
    value = parsed(value)
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, bool | int) for item in value)
    return value in (True, 1) or str(value).strip().lower() == "true"


def is_record_mark(name: object, value: object, *, is_text: bool) -> bool:
    """Return whether a column marks if its record is to be learned; other values mean something else."""
    if name in ("label", "kto_tag"):  # trl's and LLaMA-Factory's names for a good answer
        return isinstance(value, bool) and not is_text
    if name in LEARNED and isinstance(value, int | float | str):
        try:
            return 0.0 <= float(value) <= 1.0
        except ValueError:
            return _is_yes_or_no(value)
    return not is_text and _plain(name) in FLAGS | FLAGS_AGAINST and _is_yes_or_no(value)


def may_mark(name: str) -> bool:
    """Return whether a column of this name may say what is learned, and so has to be read."""
    plain = _plain(name)
    return (
        plain in FLAGS | FLAGS_AGAINST
        or _TURNS_CHOSEN.fullmatch(plain) is not None
        or ((found := _IN_SPLIT.fullmatch(plain)) is not None and split_of(found[1]) is not None)
    )


def _is_held_out(name: object, value: object) -> bool:
    """Return whether a column such as `is_test` says that its record is for evaluation."""
    split = split_of(found[1]) if (found := _IN_SPLIT.fullmatch(_plain(name))) else None
    is_marked = value is True or value == 1 or str(value).strip().lower() == "true"
    return split in ("validation", "test") and is_marked


def _is_yes_or_no(value: object) -> bool:
    return isinstance(value, bool) or str(value).strip().lower() in ("true", "false")


def _plain(key: object) -> str:
    return str(key).lower().replace("-", "_").replace(" ", "_")


#: Keys of a turn that mark whether it is learned: mistral-finetune's, Axolotl's, ms-swift's and others'.
FLAGS = frozenset(
    f"{before}{word}"
    for before in (
        "", "is_", "do_", "should_", "to_", "use_", "use_in_", "in_", "with_", "include_", "compute_",
        "calculate_", "apply_",
    )
    for word in (
        "weight", "weights", "train", "training", "trained", "trainable", "train_on", "train_on_turn",
        "train_on_this", "learn", "learned", "learnable", "loss", "loss_weight", "loss_weights", "loss_mask",
        "loss_scale", "supervise", "supervised",
    )
)  # fmt: skip
#: Keys that say the opposite.
FLAGS_AGAINST = frozenset(
    f"{before}{word}"
    for before in ("", "is_", "do_", "should_")
    for word in (
        "ignore", "ignored", "ignore_loss", "skip", "skipped", "skip_loss", "exclude", "excluded", "frozen",
        "no_train", "no_training", "no_loss", "no_learn", "not_train", "not_trained", "not_learned",
        "context_only", "prompt_only",
    )
)  # fmt: skip
#: Marks of parts of a turn, and one that some read as "learned" and others as the opposite.
UNCLEAR = ("train_detail", "mask", "masked")
_WORDS = {"0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}
#: Other words for it, of keys whose meaning is not known: `loss_on`, `mask_this`.
_ABOUT = re.compile(r"(.*_)?(train|trained|trainable|learn|learned|loss|mask|masked|supervise)(_.*)?")
#: Columns that choose turns: `trainable_turns`, `train_on_last_only`, `mask_history`, `train_on_inputs`.
_TURNS_CHOSEN = re.compile(
    r"(.*_)?(train|trained|trainable|learn|learned|loss|mask|masked|supervised?)_(.*_)?"
    r"(turns?|rounds?|messages|history|last|only|ind(ex|exes|ices)|spans?|prompts?|inputs?|answers?)(_.*)?"
)
_IN_SPLIT = re.compile(r"(?:is|in|for)_(.+)")
#: Keys of a turn whose objects are content.
_NO_NOTES = frozenset(
    {
        "content",
        "value",
        "function_call",
        "tool_call",
        "tool_calls",
        "function_calls",
        "name",
        "tools",
        "functions",
    }
)
