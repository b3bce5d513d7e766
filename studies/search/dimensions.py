"""Dimensions of a search space: ranges, choices, fixed values, and how users write them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method

Value = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """All numbers from `low` to `high`, both included, on a log scale or in steps if so said."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    default: float | None = None  # where the search starts; the (geometric) middle where not said

    def start(self) -> float:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return self.nearest(middle if self.default is None else self.default)

    def nearest(self, value: float) -> float:
        """Return the value of this range that is nearest to `value`."""
        value = min(max(value, self.low), self.high)
        if self.step is None:
            return value
        last = math.floor((self.high - self.low) / self.step + 1e-9)
        num_steps = min(round((value - self.low) / self.step), last)
        # Rounded, so that 0.03 is not 0.030000000000000002 on the screen and in the database.
        return min(max(round(self.low + num_steps * self.step, 12), self.low), self.high)

    @property
    def top(self) -> float:
        """The largest value: `high`, or the last step below it."""
        return self.nearest(self.high)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and math.isclose(self.nearest(value), value, rel_tol=1e-9)

    def __str__(self) -> str:
        text = f"{self.low:g}..{self.high:g}"
        return text + (" log" if self.log else "") + (f" step {self.step:g}" if self.step else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """One of these values."""

    values: tuple[Value, ...]
    default: Value | None = None  # the first where not said

    def start(self) -> Value:
        return self.values[0] if self.default is None else self.default

    def nearest(self, value: Value) -> Value:
        """Return `value` if it is a choice, else the nearest number, else where the search starts."""
        if value in self.values:
            return value
        numbers = [choice for choice in self.values if isinstance(choice, int | float)]
        if isinstance(value, str) or not numbers:
            return self.start()
        return min(numbers, key=lambda choice: abs(choice - value))

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Always this value; the sampler never sees it."""

    value: Value

    def start(self) -> Value:
        return self.value

    def nearest(self, value: Value) -> Value:
        return self.value

    def __contains__(self, value: object) -> bool:
        return value == self.value

    def __str__(self) -> str:
        return str(self.value)


Dimension = Range | Choices | Fixed


#: What can be searched; the fields of `space.SearchSpace`.
NAMES = (
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "lr_scheduler",
    "effective_batch_size",
    "seq_len",
    "method",
    "optimizer",
    "lora_rank",
    "lora_alpha_ratio",
    "lora_targets",
    "max_rounds",
)
INTEGER_NAMES = ("effective_batch_size", "seq_len", "max_rounds", "lora_rank")
TEXT_NAMES = ("lr_scheduler", "method", "optimizer", "lora_targets")

#: transformers' SchedulerType values that need no arguments of their own.
SCHEDULERS = (
    "linear",
    "cosine",
    "constant_with_warmup",
    "constant",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)

#: What a value of each dimension may be: lowest and highest, both included (None: no limit).
_BOUNDS: dict[str, tuple[float, float | None]] = {
    "learning_rate": (1e-12, 10.0),
    "warmup_ratio": (0.0, 0.99),
    "weight_decay": (0.0, 1.0),
    "effective_batch_size": (1, None),
    "seq_len": (2, None),  # one token to read and one to predict
    "max_rounds": (1, None),
    "lora_rank": (1, None),
    "lora_alpha_ratio": (1e-3, 1e3),
}


def parse_dimension(name: str, given: object) -> Dimension:
    """Read one dimension as a user writes it, in YAML or on the command line.

    `3e-4` or `cosine` fixes it, `[16, 32, 64]` or "16, 32, 64" are choices, and "1e-5..1e-3 log" or
    "0..0.3 step 0.05" a range.  (YAML reads 1e-5 as text; it is taken as the number it is.)

    Raises UserError naming the value, what is allowed, and an example.
    """
    check_name(name)
    if isinstance(given, Range | Choices | Fixed):
        return given
    if isinstance(given, list | tuple):
        return _choices(name, given)
    if isinstance(given, str) and ".." in given:
        return _range(name, given)
    if isinstance(given, str) and "," in given and name != "lora_targets":
        return _choices(name, given.split(","))
    return Fixed(value=_value(name, given))


def check_name(name: str) -> None:
    """Raise UserError with the nearest known name unless `name` can be searched."""
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise UserError(
            f"{name} is not a setting that can be searched.", remedy=f"{hint}Known: {', '.join(NAMES)}."
        )


def _choices(name: str, given: Sequence[object]) -> Dimension:
    values = tuple(dict.fromkeys(_value(name, item) for item in given))
    if not values:
        raise UserError(f"{name}: the list of choices is empty.", remedy="Give at least one value.")
    return Fixed(value=values[0]) if len(values) == 1 else Choices(values=values)


_RANGE = re.compile(r"(?P<low>[^\s.]\S*?)\s*\.\.\s*(?P<high>\S+)(?P<log>\s+log)?(?:\s+step\s+(?P<step>\S+))?")


def _range(name: str, text: str) -> Dimension:
    example = f'Write it as "LOW..HIGH", with " log" or " step SIZE" behind it, e.g. "{_EXAMPLES[name]}".'
    match = _RANGE.fullmatch(text.strip())
    if match is None or name in TEXT_NAMES or (match["log"] and match["step"]):
        what = "takes a list of choices, not a range" if name in TEXT_NAMES else "is not a range"
        raise UserError(f"{name}: {text!r} {what}.", remedy=example)
    low, high = (float(_value(name, match[key])) for key in ("low", "high"))
    if low > high:
        raise UserError(f"{name}: the range {text!r} ends below its start.", remedy=example)
    if low == high:
        return Fixed(value=_value(name, match["low"]))
    step = _number(name, match["step"]) if match["step"] else None
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{name}: step {step:g} does not fit between {low:g} and {high:g}.", remedy=example)
    if match["log"] and low <= 0:
        raise UserError(f"{name}: a log range has to start above 0, not at {low:g}.", remedy=example)
    if step is None and name in INTEGER_NAMES and not match["log"]:
        step = 1.0
    return Range(low=low, high=high, log=bool(match["log"]), step=step)


_EXAMPLES = {
    "learning_rate": "1e-5..1e-3 log",
    "warmup_ratio": "0..0.2 step 0.05",
    "weight_decay": "0..0.1",
    "effective_batch_size": "16..128",
    "seq_len": "512..2048",
    "max_rounds": "4, 6, 8",
    "lora_rank": "4..64 log",
    "lora_alpha_ratio": "0.5..4 log",
    "lr_scheduler": "linear, cosine",
    "method": "full, lora",
    "optimizer": "adamw_torch, adafactor",
    "lora_targets": "[all-linear, 'q_proj,v_proj']",
}


def _number(name: str, given: object) -> float:
    try:
        number = (
            float(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else None
        )
    except ValueError:
        number = None
    if number is None or not math.isfinite(number):
        raise UserError(f"{name}: {given!r} is not a number.", remedy=f'For example "{_EXAMPLES[name]}".')
    return number


def _value(name: str, given: object) -> Value:
    """Check one value of a dimension and return it in its type."""
    if name in TEXT_NAMES:
        return _text(name, given)
    number = _number(name, given)
    low, high = _BOUNDS[name]
    if number < low or (high is not None and number > high):
        bound = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise UserError(f"{name}: {number:g} is out of bounds, it has to be {bound}.")
    if name not in INTEGER_NAMES:
        return number
    if number != int(number):
        raise UserError(f"{name}: {number:g} has to be a whole number.")
    return int(number)


def _text(name: str, given: object) -> str:
    if isinstance(given, list | tuple) and name == "lora_targets":
        given = ",".join(str(item).strip() for item in given)
    text = given.strip() if isinstance(given, str) else ""
    known = {"lr_scheduler": SCHEDULERS, "method": tuple(method.value for method in Method)}.get(name)
    if not text or (known is not None and text not in known):
        allowed = f"One of: {', '.join(known)}." if known else f"For example {_EXAMPLES[name]}."
        raise UserError(f"{name}: {given!r} is not known.", remedy=allowed)
    return text
