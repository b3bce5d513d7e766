"""Files whose content is not what their names say, and tables and lines as other programs write them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autosft.profiles.dataset.sources import open_source
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import Write
from tests.profiles.dataset.test_found_files import RECORDS, TABLE, UTF8, fields


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return bytes(sink.getvalue())


def arrow(records: list[dict[str, Any]]) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(records)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


#: Name and content of files that are not what their suffix says, and what is said of them.
MISNAMED: list[tuple[str, bytes, str]] = [
    ("a.jsonl.txt", UTF8, "JSON Lines"),
    ("notes.txt", json.dumps(RECORDS, indent=1).encode(), "JSON"),
    ("a.csv", UTF8, "JSON Lines"),
    ("a.json", TABLE.format(",").encode(), "comma-separated"),
    ("Unicode text of Excel.txt", TABLE.format("\t").encode("utf-16"), "tab-separated"),
    ("a.jsonl", parquet(RECORDS), "Parquet"),
    ("a.parquet", UTF8, "JSON Lines"),
    ("train", UTF8, "JSON Lines"),
    ("part-0000", parquet(RECORDS), "Parquet"),
    ("a.jsonl.1", UTF8, "JSON Lines"),
    ("a.dat", arrow(RECORDS), "Arrow"),
    ("a.pq", parquet(RECORDS), ""),
    ("a.feather", arrow(RECORDS), ""),
]


@pytest.mark.parametrize(("name", "content", "says"), MISNAMED, ids=[name for name, *_ in MISNAMED])
def test_files_are_read_as_what_they_hold(write: Write, name: str, content: bytes, says: str) -> None:
    path = write(name, content)

    assert fields(path) == RECORDS
    assert says in "".join(open_source(path).said)
    assert bool(open_source(path).said) is bool(says)


PROSE = (
    "Text, pictures and sound are media.\nThey, prompt, completion\n",
    "prompt\n",
    '{"a": 1} is JSON.\nAnd this is text.\n',
    "[1] A note.\n",
    "conversation, messages and calls\nare three words\n",
)


@pytest.mark.parametrize("text", PROSE)
def test_prose_that_begins_like_something_else_is_text(write: Write, text: str) -> None:
    assert fields(write("a.txt", text)) == [{"text": text}]


NO_DATA: list[tuple[str, str, str]] = [
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
    ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
    ("a.json", "<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    ("a.csv", "\n<html lang='en'>404</html>", "web page"),
    ("a.xlsx", "PK", "Save the sheet as CSV"),
    ("a.jsonl.zip", "PK", "Unpack it"),
    ("a", "?", "has no suffix"),
]


@pytest.mark.parametrize(("name", "content", "says"), NO_DATA, ids=[f"{n}, {s}" for n, _, s in NO_DATA])
def test_files_that_are_no_data_are_refused_for_the_true_reason(
    write: Write, name: str, content: str, says: str
) -> None:
    path = write(name, content)
    with pytest.raises(UserError) as error:
        fields(path)
    assert says in f"{error.value} {error.value.remedy}"


ODD: list[tuple[str, str, list[dict[str, Any]]]] = [
    (
        "as Python prints them",
        "{'prompt': 'a', 'completion': None}\n" * 2,
        [{"prompt": "a", "completion": None}] * 2,
    ),
    ("a tab in a string", '{"prompt": "a\tb", "completion": "c"}\n', [{"prompt": "a\tb", "completion": "c"}]),
]


@pytest.mark.parametrize(("case", "content", "records"), ODD, ids=[case for case, *_ in ODD])
def test_lines_that_are_nearly_json_are_read(
    write: Write, case: str, content: str, records: list[dict[str, Any]]
) -> None:
    assert fields(write("a.jsonl", content)) == records, case


def test_headers_and_missing_values_of_tables_as_programs_write_them(write: Write) -> None:
    path = write("a.csv", "Instruction,Input,Output\na,nan,nan\nb,None,c\n")

    assert fields(path) == [
        {"instruction": "a", "input": "", "output": "nan"},
        {"instruction": "b", "input": "", "output": "c"},
    ]
