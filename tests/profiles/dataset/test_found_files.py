"""Files as they are found: encodings, compressions, layouts of JSON, tables of other programs."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autosft.profiles.dataset import describe, prepare
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_source
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import Write, jsonl

RECORDS = [{"prompt": f"café {n}", "completion": f"日 {n}\nb"} for n in range(3)]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n"


def read(path: str) -> list[Record | BadRecord]:
    return list(open_source(path).records())


def fields(path: str) -> list[dict[str, Any]]:
    records = read(path)
    assert all(isinstance(record, Record) for record in records), records
    return [dict(record.fields) for record in records]  # type: ignore[union-attr]


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


TABLE = "prompt{0}completion\n" + "".join(
    f'{record["prompt"]}{{0}}"{record["completion"]}"\n' for record in RECORDS
)
UTF8 = LINES.encode()
ALIKE: list[tuple[str, bytes]] = [
    ("a.jsonl", UTF8),
    ("a.ndjson", UTF8),
    ("a.jsonlines", UTF8),
    ("mark.jsonl", b"\xef\xbb\xbf" + UTF8),
    ("mark.json", b"\xef\xbb\xbf" + json.dumps(RECORDS).encode()),
    ("utf16.jsonl", LINES.encode("utf-16")),
    ("utf16.json", json.dumps(RECORDS, ensure_ascii=False).encode("utf-16")),
    ("utf16be.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
    ("utf16 without a mark.jsonl", LINES.encode("utf-16-le")),
    ("utf16be without a mark.jsonl", LINES.encode("utf-16-be")),
    ("utf32.jsonl", LINES.encode("utf-32")),
    ("utf16.csv", TABLE.format(",").encode("utf-16")),
    ("utf16.tsv", TABLE.format("\t").encode("utf-16")),
    ("marks of files put together.jsonl", b"\xef\xbb\xbf" + UTF8.replace(b"\n{", b"\n\xef\xbb\xbf{")),
    ("a sequence of RFC 7464.jsonl", b"\x1e" + UTF8.rstrip(b"\n").replace(b"\n{", b"\n\x1e{")),
    ("crlf.jsonl", UTF8.replace(b"\n{", b"\r\n{")),
    ("a.jsonl.gz", gzip.compress(UTF8)),
    ("two members.jsonl.gz", gzip.compress(UTF8[:50]) + gzip.compress(UTF8[50:])),
    ("compressed and not called so.jsonl", gzip.compress(UTF8)),
    ("compressed and not called so.json", zstd(json.dumps(RECORDS).encode())),
    ("a.jsonl.zst", zstd(UTF8)),
    ("two frames.jsonl.zst", zstd(UTF8[:50]) + zstd(UTF8[50:])),
    ("a.jsonl.bz2", bz2.compress(UTF8)),
    ("a.jsonl.xz", lzma.compress(UTF8)),
    ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
    ("a.csv.gz", gzip.compress(TABLE.format(",").encode())),
    ("utf16.jsonl.zst", zstd(LINES.encode("utf-16"))),
    ("a.csv", TABLE.format(",").encode()),
    ("a.tsv", TABLE.format("\t").encode()),
    ("semicolons.csv", TABLE.format(";").encode()),
    ("tabs.csv", TABLE.format("\t").encode()),
    ("Excel's hint.csv", b"\xef\xbb\xbfsep=;\r\n" + TABLE.format(";").encode()),
]


def by(key: Callable[[int], str]) -> dict[str, dict[str, str]]:
    return {key(number): record for number, record in enumerate(RECORDS)}


def lines(indent: int | str | None, separator: str = "\n") -> str:
    return separator.join(json.dumps(record, indent=indent) for record in RECORDS)


COLUMNS = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
SPLIT = {"columns": list(COLUMNS), "index": [0, 1, 2], "data": [list(record.values()) for record in RECORDS]}
LAYOUTS: list[tuple[str, str]] = [
    ("indented.jsonl", lines(2)),
    ("indented.json", lines(2)),
    ("indented by 0.jsonl", lines(0)),
    ("tabs.jsonl", lines("\t", "\r\n\r\n")),
    ("first on one line.jsonl", json.dumps(RECORDS[0]) + "\n" + lines(1).partition("\n}\n")[2]),
    ("glued.jsonl", lines(None, "")),
    ("glued with spaces.json", lines(None, " ")),
    ("array.jsonl", json.dumps(RECORDS)),
    ("without brackets.jsonl", lines(None, ",\n")),
    ("indented array.jsonl", json.dumps(RECORDS, indent=2)),
    ("wrapped.jsonl", json.dumps({"data": RECORDS})),
    ("wrapped with facts.json", json.dumps({"version": "1", "about": {"by": "me"}, "data": RECORDS})),
    ("by id.json", json.dumps(by("id{}".format), indent=1)),
    ("by id.jsonl", json.dumps(by("id{}".format))),
    ("by id, wrapped.json", json.dumps({"rows": by("id{}".format)})),
    ("columns.json", json.dumps(COLUMNS)),
    ("pandas.json", json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()})),
    ("pandas index.json", json.dumps(by(str))),
    ("pandas split.json", json.dumps(SPLIT)),
    ("pandas table.json", json.dumps({"schema": {"fields": [{"name": "prompt"}]}, "data": RECORDS})),
]


@pytest.mark.parametrize(("name", "content"), ALIKE, ids=[name for name, _ in ALIKE])
def test_encodings_and_compressions_are_undone(write: Write, name: str, content: bytes) -> None:
    assert fields(write(name, content)) == RECORDS


@pytest.mark.parametrize(("name", "content"), LAYOUTS, ids=[name for name, _ in LAYOUTS])
def test_records_are_found_in_every_layout_of_json(write: Write, name: str, content: str) -> None:
    assert fields(write(name, content)) == RECORDS


def test_what_pandas_has_no_value_for_is_missing(write: Write) -> None:
    content = '{"instruction": "a", "input": NaN, "system": NaN, "output": "b"}'

    assert fields(write("a.jsonl", content)) == [
        {"instruction": "a", "input": None, "system": None, "output": "b"}
    ]


def test_conversations_by_id(write: Write) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = [{"messages": turns}, {"messages": turns}]

    assert fields(write("a.json", json.dumps({"x": turns, "y": turns}))) == expected
    assert (
        fields(write("b.json", json.dumps({"x": {"messages": turns}, "y": {"messages": turns}}))) == expected
    )
    assert fields(write("c.json", json.dumps({"messages": [turns, turns]}))) == expected
    assert fields(write("d.json", json.dumps({"messages": turns}, indent=1))) == expected[:1]
    assert fields(write("e.jsonl", json.dumps({"messages": turns}, indent=1))) == expected[:1]


WHERE: list[tuple[str, str, list[str]]] = [
    ("a.jsonl", '{\n "text": "a"\n}\n\n{\n "text": "b"\n}\n', ["line 1", "line 5"]),
    ("b.json", '{\n"x": {"text": "a"},\n"y":\n{"text": "b"}}', ["line 2", "line 4"]),
    ("c.json", '{"text": ["a", "b"]}', ["row 1", "row 2"]),
    ("d.json", '{"version": 1,\n"rows": [\n{"text": "a"}]}', ["line 3"]),
]


@pytest.mark.parametrize(("name", "content", "where"), WHERE)
def test_where_records_stand(write: Write, name: str, content: str, where: list[str]) -> None:
    path = write(name, content)

    assert [record.where for record in read(path)] == [f"{path} {each}" for each in where]


BAD: list[tuple[str, str, list[str]]] = [
    ('{\n "text": "a",\n}\n{"text": "b"}\n', "line 1 column 2", ["b"]),
    ('{"text": "a"}\n{\n"text" "x"\n}\n{"text": "b"}', "line 2 column 2", ["a", "b"]),
    ('{"text": "a"}\n{"text": "x"\n{"text": "b"}', "line 2 column 13", ["a", "b"]),
    ('{"text": "a"}\n{"text": "b"}\n{\n "text": "x', "line 3 column 2", ["a", "b"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "where", "good"), BAD)
def test_a_broken_object_over_several_lines_does_not_spoil_the_next(
    write: Write, content: str, where: str, good: list[str]
) -> None:
    records = read(write("a.jsonl", content))

    problems = [record for record in records if isinstance(record, BadRecord)]
    assert where in problems[0].where
    assert [record.fields["text"] for record in records if isinstance(record, Record)] == good


DIGITS = "1" + "0" * 5000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{{"prompt": "a", "completion": "b", "x": {DIGITS}}}'),
        ("a.json", f'[{{"prompt": "a", "completion": "b", "x": -{DIGITS}}}]'),
        ("b.json", f'{{"x": {DIGITS}, "data": [{{"prompt": "a", "completion": "b"}}]}}'),
    ],
)
def test_integers_of_thousands_of_digits_are_read(write: Write, name: str, content: str) -> None:
    (record,) = fields(write(name, content))

    assert (record["prompt"], record["completion"]) == ("a", "b")


def test_such_an_integer_in_what_is_learned_is_a_bad_record(
    write: Write, chat_model: str, cache: Path
) -> None:
    call = f'{{"name": "f", "arguments": {{"x": {DIGITS}}}}}'
    turns = f'[{{"role": "user", "content": "a"}}, {{"role": "assistant", "tool_calls": [{call}]}}]'

    with pytest.raises(UserError, match="line 1: a function call's arguments is not JSON") as error:
        prepare(write("a.jsonl", f'{{"messages": {turns}}}'), model=chat_model, cache_dir=cache)
    assert len(str(error.value)) < 500


def test_the_index_that_pandas_writes_is_not_read(write: Write, chat_model: str, cache: Path) -> None:
    rows = "".join(f"{n},q{n},a{n},,x\n" for n in range(40))
    path = write("a.csv", f",prompt,completion,,Unnamed: 0\n{rows}")
    prepared = prepare(path, model=chat_model, cache_dir=cache)

    assert prepared.train.num_examples == 24
    assert "columns not used: Unnamed: 0, (without a name)" in "\n".join(describe(prepared))


def strange_columns() -> pa.Table:
    return pa.table(
        {
            "prompt": ["a", "b"],
            "completion": ["x", "y"],
            "seen": pa.array([10**15, 0], type=pa.timestamp("s")),
            "on": pa.array([2**30, 0], type=pa.date32()),
            "__index_level_0__": [0, 1],
        }
    )


def parquet(table: pa.Table, path: Path) -> str:
    pq.write_table(table, path)
    return str(path)


def arrow(table: pa.Table, path: Path) -> str:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return str(path)


@pytest.mark.parametrize(("writer", "name"), [(parquet, "a.parquet"), (arrow, "a.arrow")])
def test_columns_that_are_not_used_are_not_read(
    tmp_path: Path, writer: Callable[[pa.Table, Path], str], name: str
) -> None:
    records = fields(writer(strange_columns(), tmp_path / name))

    assert [(record["prompt"], record["completion"]) for record in records] == [("a", "x"), ("b", "y")]
    assert records[0]["seen"] == "(not read)"


def test_a_value_that_python_does_not_have_is_a_bad_record(tmp_path: Path) -> None:
    times = pa.array([10**15, 0], type=pa.timestamp("s"))
    path = parquet(pa.table({"text": times}), tmp_path / "a.parquet")
    first, second = read(path)

    assert isinstance(first, BadRecord)
    assert first.where == f"{path} row 1"
    assert isinstance(second, Record)


def test_compressed_parquet(tmp_path: Path) -> None:
    path = Path(parquet(strange_columns(), tmp_path / "a.parquet"))
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))

    assert len(fields(str(tmp_path / "b.parquet.gz"))) == 2


def test_text_that_a_table_holds_as_bytes(tmp_path: Path, chat_model: str, cache: Path) -> None:
    table = pa.table(
        {name: [f"{name} {n} é".encode() for n in range(20)] for name in ("prompt", "completion")}
    )
    prepared = prepare(parquet(table, tmp_path / "a.parquet"), model=chat_model, cache_dir=cache)

    assert prepared.train.num_examples == 10


REFUSED: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("cut.jsonl.gz", gzip.compress(UTF8)[:-12], ("cut.jsonl.gz cannot be decompressed",)),
    ("wrong.jsonl.gz", UTF8, ("wrong.jsonl.gz cannot be decompressed",)),
    ("cut.jsonl.zst", zstd(UTF8)[:-6], ("cut.jsonl.zst cannot be decompressed",)),
    ("wrong.jsonl.zst", UTF8, ("wrong.jsonl.zst cannot be decompressed",)),
    ("wrong.jsonl.xz", UTF8, ("wrong.jsonl.xz cannot be decompressed",)),
    ("a.zip", b"PK\x03\x04", ("'.zip' is not a kind of file",)),
    ("odd.jsonl", b"\xff\xfe" + b"{\x00\x00\xd8\x00\xd8", ("UTF-16",)),
    ("two.csv", b"a,b,a\n1,2,3\n", ("a name of its own",)),
    ("none.csv", b",,\n1,2,3\n", ("a name of its own",)),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_files_that_cannot_be_read_are_one_error(
    write: Write, name: str, content: bytes, says: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        read(write(name, content))

    for said in says:
        assert said in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({f"key {n}": n for n in range(20_000)}),
        json.dumps({"x" * 200_000: 1}),
        json.dumps([{f"key {n}": "x" * 1000 for n in range(500)}]),
        json.dumps([["x" * 200_000]]),
        '{"text": ' + "x" * 200_000,
        json.dumps({"messages": [{"role": "x" * 200_000, "content": "a"}]}),
        json.dumps({"messages": [{"role": "assistant", "content": "a", "weight": "x" * 200_000}]}),
        json.dumps({"conversations": [{"from": "human", "value": {"x" * 1000: "y" * 100_000}}]}),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_error_for_large_data_is_short(
    write: Write, chat_model: str, cache: Path, content: str, suffix: str
) -> None:
    with pytest.raises(UserError) as error:
        prepare(write(f"a.{suffix}", content), model=chat_model, cache_dir=cache)

    assert len(str(error.value)) < 1500
    assert "line 1" in str(error.value)


def test_splits_within_one_file_are_not_mixed(write: Write, chat_model: str, cache: Path) -> None:
    def some(word: str, count: int) -> list[dict[str, str]]:
        return [{"prompt": f"{word} {n}", "completion": "x"} for n in range(count)]

    content = {"train": some("learn", 40), "validation": some("look", 9), "test": some("secret", 9)}
    prepared = prepare(write("a.json", json.dumps(content)), model=chat_model, cache_dir=cache)

    assert sum(counts.num_examples for counts in (prepared.train, prepared.eval, prepared.final)) == 40
    assert "splits within a file that are not read: validation, test" in "\n".join(describe(prepared))


def test_a_line_of_a_file_tells_its_split(write: Write, chat_model: str, cache: Path) -> None:
    records = [
        {"prompt": f"{n}", "completion": "x", "split": "test" if n % 4 == 0 else "train"} for n in range(40)
    ]
    prepared = prepare(write("a.jsonl", jsonl(records)), model=chat_model, cache_dir=cache)

    assert sum(counts.num_examples for counts in (prepared.train, prepared.eval, prepared.final)) == 30
    assert "10 records left out: their column split says test" in "\n".join(describe(prepared))
