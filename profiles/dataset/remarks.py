"""Collect remarks about data for the user: counted per record, reported in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from autosft.profiles.dataset.problems import brief_list


@dataclass(slots=True)
class Remarks:
    """Remarks on the records of all sources."""

    said: list[str] = field(default_factory=list)  # about files, in sentences
    found: Counter[str] = field(default_factory=Counter)  # number of records for each finding
    left_out: Counter[str] = field(default_factory=Counter)  # records for each reason
    unused_columns: Counter[str] = field(default_factory=Counter)  # records with a value in them
    splits_left_out: dict[str, int] = field(default_factory=dict)  # within a file, in order of appearance

    def add(self, found: Iterable[str], unused: Iterable[str], splits_left_out: Iterable[str]) -> None:
        """Count the findings of one record."""
        self.found.update(found)
        self.unused_columns.update(unused)
        self.splits_left_out.update(dict.fromkeys(splits_left_out, 0))

    def sentences(self) -> tuple[str, ...]:
        """Return all remarks as sentences, beginning with what is left out."""
        said = list(dict.fromkeys(self.said))
        if self.splits_left_out:
            said.append(f"splits within a file that are not read: {brief_list(self.splits_left_out)}")
        said += [f"{_records(count)} left out: {why}" for why, count in self.left_out.most_common()]
        said += [f"{_records(count)}: {what}" for what, count in self.found.most_common()]
        if self.unused_columns:
            said.append(f"columns not used: {brief_list(self.unused_columns)}")
        return tuple(said)


def _records(count: int) -> str:
    return f"{count:,} record{'' if count == 1 else 's'}"
