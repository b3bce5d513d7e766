"""IFEval: prompts from a file, lm-eval's checks, what cannot be scored here, and racing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from autosft.profiles.dataset.ifeval_prompts import Prompt, read_prompts, scorable, shuffled, write_prompts
from autosft.profiles.errors import UserError
from autosft.studies.results.losses import read_passes
from autosft.studies.results.racing import BLOCK
from autosft.workers.scoring.ifeval import CheckerProcess, check_here, score

pytest.importorskip("lm_eval", reason="the optional part 'eval' is not installed")

NO_COMMA, WORDS, SENTENCES = (
    "punctuation:no_comma",
    "length_constraints:number_words",
    "length_constraints:number_sentences",
)
ARGUMENTS = {
    NO_COMMA: {},
    WORDS: {"relation": "at least", "num_words": 3},
    SENTENCES: {"relation": "at least", "num_sentences": 2},
}


def prompt(key: int, *instructions: str) -> Prompt:
    return Prompt(
        key=key,
        prompt=f"Prompt {key}",
        instructions=instructions,
        arguments=tuple(ARGUMENTS[name] for name in instructions),
    )


CHECKS = [
    ("both followed", (NO_COMMA, WORDS), "one two three", (True, True), (True, True)),
    ("one broken", (NO_COMMA, WORDS), "one, two three", (False, True), (False, True)),
    ("loose forgives a first line", (NO_COMMA,), "Sure, here:\nno comma", (False,), (True,)),
    ("an empty answer follows nothing", (NO_COMMA,), "", (False,), (False,)),
]


@pytest.mark.parametrize(
    ("name", "instructions", "answer", "strict", "loose"), CHECKS, ids=[c[0] for c in CHECKS]
)
def test_checks(
    name: str,
    instructions: tuple[str, ...],
    answer: str,
    strict: tuple[bool, ...],
    loose: tuple[bool, ...],
) -> None:
    assert check_here(prompt(1, *instructions), answer) == (strict, loose)


def test_another_process_checks_alike_and_names_an_unknown_instruction() -> None:
    checker = CheckerProcess()
    try:
        assert checker(prompt(1, NO_COMMA), "a, b") == check_here(prompt(1, NO_COMMA), "a, b")
        unknown = Prompt(key=7, prompt="x", instructions=("made:up",), arguments=({},))
        with pytest.raises(UserError, match=r"prompt 7.*made:up"):
            checker(unknown, "x")
        assert checker(prompt(1, WORDS), "one two three") == ((True,), (True,))  # it lives on
    finally:
        checker.close()


def test_without_punkt_its_instructions_are_named_and_left_out() -> None:
    prompts = [prompt(1, NO_COMMA), prompt(2, SENTENCES, NO_COMMA), prompt(3, SENTENCES)]
    left, notes = scorable(prompts, has_punkt=False)
    assert [item.instructions for item in left] == [(NO_COMMA,), (NO_COMMA,)]
    assert "number_sentences (2)" in notes[0]
    assert "2 of 3 prompts are left" in notes[0]
    assert scorable(prompts, has_punkt=True) == (tuple(prompts), ())


def test_prompts_from_files(tmp_path: Path) -> None:
    record = {
        "key": 5,
        "prompt": "Hi",
        "instruction_id_list": [WORDS],
        # As on the hub: every argument of every instruction, most of them empty.
        "kwargs": [{"relation": "at least", "num_words": 3, "keywords": None}],
    }
    for name, text in (("a.json", json.dumps([record])), ("a.jsonl", json.dumps(record) + "\n")):
        (tmp_path / name).write_text(text)
        [one] = read_prompts(str(tmp_path / name))
        assert one.arguments == ({"relation": "at least", "num_words": 3},)
        write_prompts(tmp_path / "out.jsonl", [one])
        assert read_prompts(str(tmp_path / "out.jsonl")) == (one,)


BAD = [
    ("not JSON", "[{", "not JSON"),
    ("no prompt", "[]", "holds no prompt"),
    ("a column is missing", '[{"key": 1}]', "record 1"),
    (
        "arguments do not match",
        '[{"key": 1, "prompt": "x", "instruction_id_list": ["a"], "kwargs": []}]',
        "1 instructions with 0 sets",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[item[0] for item in BAD])
def test_bad_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(str(path))


def test_separators_within_a_string_and_a_mark_at_the_start_are_no_trouble(tmp_path: Path) -> None:
    """U+2028 ends a line for str.splitlines, but not in a file of JSON lines; numbers are the file's."""
    told = {"key": 1, "prompt": "a\u2028b\u0085c", "instruction_id_list": [NO_COMMA], "kwargs": [{}]}
    line = json.dumps(told, ensure_ascii=False)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\n\n{line}\n".encode())
    assert [item.prompt for item in read_prompts(str(path))] == ["a\u2028b\u0085c"] * 2
    path.write_text(f"{line}\n\n{line[:-1]}\n", encoding="utf-8")
    with pytest.raises(UserError, match="at line 3"):
        read_prompts(str(path))
    path.write_text('{"key": 1, "prompt": "x"}\n')
    with pytest.raises(UserError, match="line 1: no prompt of IFEval, instruction_id_list, kwargs missing"):
        read_prompts(str(path))


def test_the_order_depends_on_the_seed_alone() -> None:
    prompts = [prompt(key, NO_COMMA) for key in range(20)]
    assert shuffled(prompts, seed=0) == shuffled(prompts[::-1], seed=0)
    assert shuffled(prompts, seed=0) != shuffled(prompts, seed=1)


def test_a_hopeless_candidate_is_asked_few_prompts(tmp_path: Path) -> None:
    prompts = [prompt(key, NO_COMMA) for key in range(4 * BLOCK)]
    asked: list[str] = []

    def bad(texts: Sequence[str]) -> list[str]:
        asked.extend(texts)
        return ["a, b"] * len(texts)

    best = score(prompts, lambda texts: ["fine"] * len(texts), check=check_here)
    assert (best.value, best.is_raced, len(best.strict)) == (1.0, False, len(prompts))
    lost = score(prompts, bad, check=check_here, incumbent=best.passes)
    assert lost.is_raced
    assert len(asked) == BLOCK
    assert lost.value == 0.0
    assert dict(lost.metrics())["ifeval_prompts"] == BLOCK

    best.save(tmp_path / "best.json", step=1)
    lost.save(tmp_path / "lost.json", step=2)
    assert read_passes(tmp_path / "best.json") == best.passes
    assert read_passes(tmp_path / "lost.json") is None  # nobody is raced against a part
