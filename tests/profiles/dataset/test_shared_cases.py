"""The inputs of ../shared/cases, where they are beside this checkout: each is read as its README says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from autosft.profiles.dataset import PreparedData, Split, describe, prepare
from tests.profiles.dataset.prepared_data import SHARED, rows, texts

CASES = SHARED / "cases" / "data"

pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason="the shared cases are not beside this checkout (AUTOSFT_SHARED)"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    file: str
    learned: tuple[str, ...] = ()
    read: tuple[str, ...] = ()  # in the prompt, not learned
    nowhere: tuple[str, ...] = ()
    said: str = ""


READ = [
    Case(file="sharegpt_weight_0.jsonl", learned=("Good day",), read=("Go away",), said="by weight"),
    Case(
        file="openai_functions_column.jsonl",
        learned=('"oven": ', "Oven "),
        read=("reads one oven",),
        said="the column functions lists the tools",
    ),
    Case(file="calls_with_parameters.jsonl", learned=('{"shelf": ',), nowhere=('"arguments": {}',)),
    Case(
        file="calls_written_in_text.jsonl", learned=("<tool_call>", "holds 7"), read=("<tool_response>\n7",)
    ),
    Case(file="tools_nested.jsonl", learned=('"shelf": ', "is done")),
    Case(file="tools_nested.parquet", learned=('"shelf": ', "is done"), nowhere=("null",), said="nulls"),
    Case(file="pandas_index_column.csv", learned=("spelled\n",), said="columns not used: (without a name)"),
    Case(file="utf16.jsonl", learned=("spelt",), read=("Spell",)),
    Case(file="number_of_4301_digits.jsonl", learned=("many",), said="columns not used: value"),
    Case(file="pretty_printed.jsonl", learned=("spelt",), read=("Spell",)),
    Case(file="role_with_value.jsonl", learned=("spelt",), read=("Spell",)),
    Case(file="llamafactory_folder", learned=("spelt",), read=("Spell",), said="data set mine"),
    Case(file="control_characters.jsonl", learned=("\x1b[31m",)),
    Case(file="plain_chat.jsonl", learned=("It is",), read=("plus",)),
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.file)
def test_cases_are_read(case: Case, chat_model: str, cache: Path) -> None:
    prepared = prepare(str(CASES / case.file), model=chat_model, cache_dir=cache)
    spans = [span for sample in prepared.samples for span in sample]
    learned = "".join(text for text, is_scored in spans if is_scored)
    read = "".join(text for text, is_scored in spans if not is_scored)

    assert all(text in learned for text in case.learned)
    assert all(text in read and text not in learned for text in case.read)
    assert not any(text in learned + read for text in case.nowhere)
    assert case.said in "\n".join(describe(prepared))
    assert not prepared.skipped


def test_a_table_and_its_json_lines_have_the_same_tokens(chat_model: str, cache: Path) -> None:
    def all_of(prepared: PreparedData) -> list[tuple[list[int], list[int]]]:
        return sorted((row["input_ids"], row["labels"]) for split in Split for row in rows(prepared, split))

    lines, table = (
        prepare(str(CASES / f"tools_nested.{suffix}"), model=chat_model, cache_dir=cache)
        for suffix in ("jsonl", "parquet")
    )
    assert all_of(lines) == all_of(table)
    assert texts(lines, Split.TRAIN)
