"""Dimensions of a search space: ranges, choices and fixed values."""

from __future__ import annotations

import math
from dataclasses import dataclass

Value = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """All numbers from `low` to `high`, inclusive, optionally on a log scale or in steps."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    default: float | None = None  # where the search starts; None: the (geometric) middle

    def start(self) -> float:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return self.nearest(middle if self.default is None else self.default)

    def nearest(self, value: float) -> float:
        """Return the value in this range that is nearest to `value`."""
        value = min(max(value, self.low), self.high)
        if self.step is None:
            return value
        last = math.floor((self.high - self.low) / self.step + 1e-9)
        num_steps = min(round((value - self.low) / self.step), last)
        # Rounded, so that 0.03 is not shown and stored as 0.030000000000000002.
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
    """One of a list of values."""

    values: tuple[Value, ...]
    default: Value | None = None  # where the search starts; None: the first

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
    """A single value; the sampler never sees it."""

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
