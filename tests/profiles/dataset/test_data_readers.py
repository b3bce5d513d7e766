"""Reading: what is read from each kind of file, where records stand, and what is said about broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_source
from autosft.profiles.errors import UserError

Write = Callable[[str, "str | bytes"], str]

RECORDS = [{"prompt": "a", "completion": "b"}, {"prompt": "é\n", "completion": "日"}]


def read(path: str) -> list[Record | BadRecord]:
    return list(open_source(path).records())


def fields(path: str) -> list[dict[str, object]]:
    records = read(path)
    assert all(isinstance(record, Record) for record in records), records
    return [dict(record.fields) for record in records]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(RECORDS)),
        ("indented.json", json.dumps(RECORDS, indent=2, ensure_ascii=False)),
        ("wrapped.json", json.dumps({"data": RECORDS}, indent=2)),
        ("lines.json", "\n".join(map(json.dumps, RECORDS))),
        ("lines.jsonl", "\n\n".join(map(json.dumps, RECORDS)) + "\n"),
        ("bom.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, RECORDS))),
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("table.csv", 'prompt,completion\r\na,b\r\n"é\n",日\r\n'),
        ("bom.csv", '\ufeffprompt,completion\na,b\n"é\n",日\n'),
        ("UPPER.JSON", json.dumps(RECORDS)),
    ],
)
def test_same_records_from_every_kind_of_file(write: Write, name: str, content: str) -> None:
    assert fields(write(name, content)) == RECORDS


def test_parquet(write: Write) -> None:
    path = write("part.parquet", b"")
    pq.write_table(pa.Table.from_pylist(RECORDS), path)

    assert fields(path) == RECORDS
    assert [record.where for record in read(path)] == [f"{path} row 1", f"{path} row 2"]


def test_single_object_is_one_record(write: Write) -> None:
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}

    assert fields(write("one.json", json.dumps(record, indent=1))) == [record]


def test_text_file_is_one_document(write: Write) -> None:
    assert fields(write("book.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]


def test_folder_is_read_by_name_without_what_is_no_data(write: Write) -> None:
    write("data/b.jsonl", json.dumps(RECORDS[1]))
    write("data/a.json", json.dumps([RECORDS[0]]))
    write("data/README.md", "# about")
    write("data/.hidden/c.jsonl", "broken")
    folder = write("data/deep/z.csv", "prompt,completion\nx,y\n").rsplit("/", 2)[0]

    assert fields(folder) == [*RECORDS, {"prompt": "x", "completion": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.json", '[\n{"text": "a"},\n\n{"text":\n"b"}, {"text": "c"}]', [2, 4, 5]),
        ("b.json", '{"rows":\n[\n{"text": "a"},\n{"text": "b"}]}', [3, 4]),
        ("c.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', [1, 3]),
        ("d.csv", 'text\na\n"b\nb"\nc\n', [2, 3, 5]),
    ],
)
def test_where_records_stand(write: Write, name: str, content: str, lines: list[int]) -> None:
    path = write(name, content)

    assert [record.where for record in read(path)] == [f"{path} line {line}" for line in lines]


@pytest.mark.slow
@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2), max_size=5),
    indent=st.sampled_from([None, 0, 2]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_read_as_json_reads_them(
    tmp_path: Path, records: list[dict[str, str]], indent: int | None
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records, indent=indent), encoding="utf-8")

    assert fields(str(path)) == records


@dataclass(frozen=True, kw_only=True)
class Refused:
    case: str
    name: str
    content: str | bytes
    says: tuple[str, ...]


REFUSED = [
    Refused(case="empty", name="a.json", content="", says=("a.json is empty",)),
    Refused(case="white space", name="a.json", content=" \n\n", says=("a.json is empty",)),
    Refused(case="white space lines", name="a.jsonl", content=" \n\n", says=("a.jsonl is empty",)),
    Refused(case="kind", name="a.xlsx", content="x", says=("'.xlsx' is not a kind of file", ".parquet")),
    Refused(
        case="broken array",
        name="a.json",
        content='[\n  {"text": "a"},\n  {"text" "b"}\n]',
        says=("a.json line 3 column 11: broken JSON: expecting ':' delimiter, found",),
    ),
    Refused(
        case="no comma",
        name="a.json",
        content='[{"text": "a"}\n {"text": "b"}]',
        says=("a.json line 2 column 2: broken JSON: expecting ',' or ']'",),
    ),
    Refused(
        case="trailing comma",
        name="a.json",
        content='[{"text": "a"},\n]',
        says=("a.json line 2 column 1: broken JSON",),
    ),
    Refused(
        case="trailing comma of an array called JSON Lines",
        name="a.jsonl",
        content='[\n{"text": "a"},\n{"text": "b"},\n]',
        says=("a.jsonl line 4 column 1: broken JSON",),
    ),
    Refused(
        case="more behind the array",
        name="a.json",
        content='[{"text": "a"}]\n[{"text": "b"}]',
        says=("a.json line 2 column 1: broken JSON: extra data",),
    ),
    Refused(
        case="cut off",
        name="a.json",
        content='[{"text": "a"},\n{"text": "b',
        says=("a.json line 2", "broken JSON"),
    ),
    Refused(
        case="cut off between records",
        name="a.json",
        content='[{"text": "a"},\n',
        says=("a.json line 2: broken JSON: the file ends in the middle",),
    ),
    Refused(case="no records", name="a.json", content='"text"', says=("a.json line 1: expected an array",)),
    Refused(
        case="not UTF-8",
        name="a.json",
        content=b'[\n{"text": "caf\xe9"}]',
        says=("a.json line 2: not UTF-8 (byte 0xe9 at offset 15)", "iconv"),
    ),
    Refused(
        case="not UTF-8 text",
        name="a.txt",
        content=b"one\ntwo\n\xff",
        says=("a.txt line 3: not UTF-8 (byte 0xff at offset 8)",),
    ),
    Refused(
        case="not UTF-8 table",
        name="a.csv",
        content=b"text\ncaf\xe9\n",
        says=("a.csv line 2: not UTF-8",),
    ),
    Refused(
        case="two columns of one name", name="a.csv", content="text,text\na,b\n", says=("a name of its own",)
    ),
    Refused(case="quote", name="a.csv", content='text\n"a\n', says=("a.csv line 2: broken CSV",)),
    Refused(case="no parquet", name="a.parquet", content="x" * 20, says=("not a readable Parquet file",)),
    Refused(
        case="nested too deeply",
        name="a.json",
        content="[" * 100_000,
        says=("a.json line 1: broken JSON: nested too deeply",),
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.case)
def test_files_that_cannot_be_read_on_are_one_clear_error(write: Write, refused: Refused) -> None:
    path = write(refused.name, refused.content)

    with pytest.raises(UserError) as error:
        read(path)

    for said in refused.says:
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "bad", "num_good"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text" "b"}\n{"text": "c"}\n', "line 2 column 9: broken JSON", 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8 (byte 24 of the file)", 1),
        ("a.jsonl", '{"text": "a"}\n[1, 2]\n', "line 2: not an object ([1, 2])", 1),
        ("a.json", '[{"text": "a"},\n"b"]', "line 2: not an object ('b')", 1),
        ("a.csv", "text,x\na,b\nc\nd,e\n", "line 3: wrong number of fields (1, header has 2)", 2),
    ],
)
def test_a_bad_record_does_not_spoil_the_others(
    write: Write, name: str, content: str | bytes, bad: str, num_good: int
) -> None:
    records = read(write(name, content))

    (problem,) = (record for record in records if isinstance(record, BadRecord))
    assert bad in str(problem)
    assert len(records) == num_good + 1


def test_missing_file_names_the_nearest(write: Write) -> None:
    path = write("alpaca_en_demo.json", "[]")

    with pytest.raises(UserError, match="does not exist") as error:
        open_source(path.replace("demo", "dmo"))
    assert error.value.remedy == f"Did you mean {path}?"


@pytest.mark.parametrize("name", ["no-such-data-set", "nobody/no-such-data-set"])
def test_neither_file_nor_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not exist here, and the hub cannot be reached"):
        open_source(name)


def test_folder_without_data(tmp_path: object) -> None:
    with pytest.raises(UserError, match="holds no data file"):
        open_source(str(tmp_path))


def test_fingerprint_is_of_content_and_kind_not_of_names(write: Write) -> None:
    one, same = write("one.json", "[1]"), write("sub/two.json", "[1]")
    other, kind = write("three.json", "[2]"), write("four.jsonl", "[1]")

    assert open_source(one).fingerprint == open_source(same).fingerprint
    assert len({open_source(path).fingerprint for path in (one, other, kind)}) == 3
