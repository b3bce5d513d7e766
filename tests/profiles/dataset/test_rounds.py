"""Searching how many rounds are kept: one more training split each, and one evaluation for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import load_from_disk

from autosft.profiles.dataset import Split, describe, length_profile, load_prepared, prepare
from autosft.profiles.dataset.prepared import eval_fingerprint
from autosft.profiles.errors import UserError

Write = Callable[[str, "str | bytes"], str]


def chat(number: int, num_rounds: int) -> dict[str, object]:
    messages = [{"role": "system", "content": f"Count {number}"}]
    for item in range(num_rounds):
        messages.append({"role": "user", "content": f"say {number} {item}"})
        messages.append({"role": "assistant", "content": f"yes {number} {item}"})
    return {"messages": messages}


@pytest.fixture
def chats(write: Write) -> str:
    # A third each of conversations with one, two and three rounds.
    return write("chats.jsonl", "\n".join(json.dumps(chat(n, 1 + n % 3)) for n in range(90)))


def test_each_number_of_rounds_is_a_training_split_of_its_own(
    chats: str, chat_model: str, tmp_path: Path
) -> None:
    whole = prepare(chats, model=chat_model, cache_dir=tmp_path)
    cut = prepare(chats, model=chat_model, cache_dir=tmp_path, train_rounds=(2, 1))

    assert [item.max_rounds for item in cut.rounds] == [1, 2]
    assert load_prepared(cut.path).rounds == cut.rounds
    one, two = cut.rounds
    assert one.train.num_turns == 3 * whole.train.num_examples  # system, question, answer
    assert one.train.num_tokens < two.train.num_tokens < whole.train.num_tokens
    assert 0.6 < one.cut_share < 0.74  # two of three conversations, but for the draw of the split
    assert 0.26 < two.cut_share < 0.4
    assert one.lost_scored_share == pytest.approx(1 - one.train.num_scored / whole.train.num_scored)
    assert sum(length_profile(cut, 64, max_rounds=1).lengths) == one.train.num_tokens
    assert f"at most 1 round cuts {one.cut_share:.1%}" in "\n".join(describe(cut))

    rows = load_from_disk(str(cut.split_dir(Split.TRAIN, 1)))
    full = load_from_disk(str(cut.split_dir(Split.TRAIN)))
    for short, long in zip(rows["input_ids"], full["input_ids"], strict=True):
        assert long[: len(short)] == short  # cut after an answer, and the system message stays


def test_what_is_evaluated_and_learned_whole_does_not_change(
    chats: str, chat_model: str, tmp_path: Path
) -> None:
    whole = prepare(chats, model=chat_model, cache_dir=tmp_path)
    cut = prepare(chats, model=chat_model, cache_dir=tmp_path, train_rounds=(1, 2))
    assert whole.path != cut.path
    for split in Split:
        before, after = (load_from_disk(str(item.split_dir(split))) for item in (whole, cut))
        assert eval_fingerprint(before, 64) == eval_fingerprint(after, 64)


def test_a_single_number_reports_how_many_conversations_it_cuts(
    chats: str, chat_model: str, tmp_path: Path
) -> None:
    prepared = prepare(chats, model=chat_model, cache_dir=tmp_path, max_rounds=1)
    assert any("later rounds are left out of 60 of 90 conversations" in line for line in describe(prepared))


def test_text_has_no_rounds(write: Write, plain_model: str, tmp_path: Path) -> None:
    text = write("a.txt", "\n".join(f"line {n} of a text" for n in range(400)))
    with pytest.raises(UserError, match="no rounds"):
        prepare(text, model=plain_model, cache_dir=tmp_path, block_size=16, train_rounds=(1, 2))
