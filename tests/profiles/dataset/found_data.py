"""Folders of data as people have them, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_sources

CARD = "---\nlicense: mit\nconfigs:\n{}\n---\n# About\n"


def pairs(word: str, count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}:", "completion": " x"} for n in range(count)]


def lines(word: str, count: int = 40) -> str:
    return "\n".join(map(json.dumps, pairs(word, count)))


def lay_out(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if content.startswith(("---", "{", "[", "#")) else lines(content))


def words_in(text: str, *, is_evaluated: bool = False) -> list[str]:
    """The words of the records that are read to learn from."""
    records = [
        record for source in open_sources(text, is_evaluated=is_evaluated) for record in source.records()
    ]
    assert all(isinstance(record, Record) for record in records), records
    found = (str(record.fields["prompt"]).split()[0] for record in records)  # type: ignore[union-attr]
    return list(dict.fromkeys(found))
