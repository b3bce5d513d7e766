"""Bad records: refused with their place in the data, or counted and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from autosft.profiles.errors import UserError

MASK_FAILED = "the mask of scored tokens does not hold"
ANSWER_HIDDEN = "the chat template does not show the whole answer"

_REMEDIES = {
    MASK_FAILED: "Give the tokenizer a chat template with {% generation %} marks around the answers",
    ANSWER_HIDDEN: "Use a tokenizer whose chat template shows it (templates for use often drop thinking), "
    "remove that part from the data",
}


class BadRecordError(Exception):
    """A record breaks a rule of its format; `reason` is what such records are counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A record that cannot be used although others of its source can."""

    where: str
    reason: str  # the same for all records of a kind: they are counted by it
    detail: str = ""  # what is wrong with this record

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(slots=True)
class Problems:
    """The bad records found so far."""

    skip: bool
    num_records: int = 0
    bad: list[BadRecord] = field(default_factory=list)

    def settle(self) -> None:
        """Raise UserError for bad records unless they are skipped, and if no record is left."""
        if not self.bad:
            return
        first, many = self.bad[0], f"{len(self.bad):,} of {self.num_records:,}"
        if self.skip:
            if len(self.bad) >= self.num_records:
                raise UserError(f"no usable record is left: {many} are bad, the first is {first}.")
            return
        remedy = _REMEDIES.get(first.reason, "Correct or remove the record")
        raise UserError(
            f"{first}.", remedy=f"{remedy}, or pass --skip-bad-records to leave such records out ({many})."
        )

    def counts(self) -> tuple[tuple[str, int], ...]:
        """Return the reasons with their numbers of records, the most frequent first."""
        return tuple(Counter(bad.reason for bad in self.bad).most_common())


def brief(value: object, limit: int = 60) -> str:
    """Return a text, or the `repr` of another value, in at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def brief_list(names: Iterable[object], limit: int = 12) -> str:
    """Return names separated by commas: at most `limit` of them, each at most 40 characters."""
    listed = [brief(str(name), 40) for name in names]
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
