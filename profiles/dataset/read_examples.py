"""Read examples from sources; a source's format is that of most of its records, the others are bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autosft.profiles.dataset.convert import LeftOut, to_example, unused_columns
from autosft.profiles.dataset.formats import DataFormat, Example, describe_columns, recognise
from autosft.profiles.dataset.problems import BadRecord, Problems
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.remarks import Remarks
from autosft.profiles.dataset.sources import Source
from autosft.profiles.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSources:
    """The examples of all sources, and the format of each."""

    examples: tuple[Example, ...]
    formats: tuple[DataFormat, ...]


def read_sources(
    sources: Sequence[Source],
    problems: Problems,
    remarks: Remarks,
    *,
    max_rounds: int | None,
    is_evaluated: bool = False,
) -> ReadSources:
    """Read all records of the sources.  Raises `UserError` for bad records, and if none is usable."""
    examples: list[Example] = []
    formats = []
    for number, source in enumerate(sources):
        reading = _Reading(source.name, number, problems, remarks, max_rounds, is_evaluated)
        data_format, read = reading.read(source.records())
        examples += read
        formats.append(data_format)
    return ReadSources(examples=tuple(examples), formats=tuple(formats))


def read_validation(
    sources: Sequence[Source], problems: Problems, remarks: Remarks, *, max_rounds: int | None
) -> ReadSources:
    """Read the sources' validation files in the same way; all sources have some."""
    examples: list[Example] = []
    formats = []
    for number, source in enumerate(sources):
        name = ", ".join(path.name for path in source.validation[:3])
        reading = _Reading(f"{source.name} ({name})", number, problems, remarks, max_rounds, True)
        data_format, read = reading.read(source.validation_records())
        examples += read
        formats.append(data_format)
    return ReadSources(examples=tuple(examples), formats=tuple(formats))


@dataclass(slots=True)
class _Reading:
    """One source while it is read."""

    name: str
    number: int
    problems: Problems
    remarks: Remarks
    max_rounds: int | None
    is_evaluated: bool

    def read(self, records: Iterable[Record | BadRecord]) -> tuple[DataFormat, list[Example]]:
        made: list[tuple[DataFormat | None, Example | BadRecord | LeftOut]] = []
        for record in records:
            if isinstance(record, BadRecord):
                made.append((None, record))
                continue
            found = recognise(record)
            if found is None:
                columns = describe_columns(record)
                made.append((None, BadRecord(where=record.where, reason=_UNKNOWN, detail=columns)))
                continue
            example = to_example(
                record, found, self.max_rounds, source=self.number, is_evaluated=self.is_evaluated
            )
            made.append((found, example))
            self.remarks.add(
                () if isinstance(example, BadRecord | LeftOut) else example.found,
                unused_columns(record, found),
                record.splits_left_out,
            )
        if not made:
            raise UserError(f"{self.name} holds no record.")
        return self._settled(made)

    def _settled(
        self, made: Sequence[tuple[DataFormat | None, Example | BadRecord | LeftOut]]
    ) -> tuple[DataFormat, list[Example]]:
        """Return the examples of the source's format; add the rest to the problems and remarks."""
        self.problems.num_records += len(made)
        counts = Counter(found for found, _ in made if found is not None)
        if not counts:
            bad = [record for _, record in made if isinstance(record, BadRecord)]
            self.problems.bad += [record for record in bad if record.reason != _UNKNOWN]
            self.problems.settle()
            first = next(record for record in bad if record.reason == _UNKNOWN)
            raise UserError(f"{first.where}: no known format: {first.detail}.")
        ((data_format, num_same),) = counts.most_common(1)
        examples: list[Example] = []
        for found, example in made:
            if isinstance(example, LeftOut):
                self.remarks.left_out[example.why] += 1
            elif found is not None and found is not data_format:
                where = example.where
                detail = f"{found.label}; {num_same:,} of {len(made):,} records are {data_format.label}"
                self.problems.bad.append(BadRecord(where=where, reason="mixed formats", detail=detail))
            elif isinstance(example, BadRecord):
                self.problems.bad.append(example)
            else:
                examples.append(example)
        self.problems.settle()
        if not examples:
            left_out = next(iter(self.remarks.left_out), None)
            why = f": {left_out}" if left_out else ""
            raise UserError(f"no usable record is left in {self.name}{why}.")
        return data_format, examples


_UNKNOWN = "no known format"
