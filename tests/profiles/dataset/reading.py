"""What tests of reading share: a record as a source gives it, converted, and what is said of it."""

from __future__ import annotations

from typing import Any

from autosft.profiles.dataset.convert import LeftOut, to_example
from autosft.profiles.dataset.formats import Conversation, Example, recognise
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record


def convert(fields: dict[str, Any], *, fills_nulls: bool = False) -> Example | BadRecord | LeftOut:
    record = Record(where="data.jsonl line 7", fields=fields, fills_nulls=fills_nulls)
    data_format = recognise(record)
    assert data_format is not None
    return to_example(record, data_format)


def conversation(fields: dict[str, Any], *, fills_nulls: bool = False) -> Conversation:
    example = convert(fields, fills_nulls=fills_nulls)
    assert isinstance(example, Conversation), example
    return example


def user(content: object = "a", **more: object) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: object = "b", **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def human(value: object = "a", **more: object) -> dict[str, Any]:
    return {"from": "human", "value": value, **more}


def gpt(value: object = "b", **more: object) -> dict[str, Any]:
    return {"from": "gpt", "value": value, **more}
