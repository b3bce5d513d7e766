"""Answers that are kept on disk are found again, and never where something else decides them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from autosft.profiles import answer_cache
from autosft.profiles.answer_cache import FILE, AnswerCache, key_of
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.recipe import ByteRange, MemoryEstimate

ANSWER = MemoryEstimate(
    allocated=ByteRange(median_bytes=1, upper_bytes=2),
    need=ByteRange(median_bytes=3, upper_bytes=4),
    uncapped=ByteRange(median_bytes=5, upper_bytes=6),
    outside_bytes=7,
    components=(("parameters", 1), ("logits and loss", 0)),
    peak_phase="forward",
    peak_owner="the parameters, 1 B",
    method="trace and replay",
    bound_level=0.9,
    num_calibration_rows=0,
    untraced=(),
    phases=(("forward", 1),),
)


def test_an_answer_is_found_again(tmp_path: Path) -> None:
    AnswerCache(tmp_path / "new").put("key", ANSWER)
    assert AnswerCache(tmp_path / "new").get("key", MemoryEstimate) == ANSWER
    assert AnswerCache(tmp_path / "new").get("another", MemoryEstimate) is None
    assert AnswerCache(None).get("key", MemoryEstimate) is None


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\0" * 4096])
def test_a_broken_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    cache = AnswerCache(tmp_path)
    assert cache.get("key", MemoryEstimate) is None
    cache.put("key", ANSWER)
    assert cache.get("key", MemoryEstimate) == ANSWER


def test_an_answer_of_another_form_is_none(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.put("key", ANSWER)
    assert cache.get("key", DeviceProfile) is None


def test_another_process_that_writes_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_cache, "TIMEOUT_S", 0.0)
    cache = AnswerCache(tmp_path)
    cache.put("key", ANSWER)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert cache.get("key", MemoryEstimate) is None
    cache.put("another", ANSWER)
    other.close()
    assert cache.get("key", MemoryEstimate) == ANSWER  # the file was not taken for a broken one
    assert cache.get("another", MemoryEstimate) is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = AnswerCache(tmp_path / "file")
    cache.put("key", ANSWER)
    assert cache.get("key", MemoryEstimate) is None


def test_the_oldest_answers_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_cache, "MAX_ANSWERS", 3)
    cache = AnswerCache(tmp_path)
    for number in range(5):
        cache.put(str(number), ANSWER)
    assert [cache.get(str(number), MemoryEstimate) is not None for number in range(5)] == [
        False, False, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["_code_mark", "_versions"])
def test_code_and_versions_are_part_of_the_key(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("memory", 1)
    assert key_of("memory", 1) == before != key_of("memory", 2)
    monkeypatch.setattr(answer_cache, what, lambda: "another")
    assert key_of("memory", 1) != before
