"""The benchmark of hard limits: the same requests every time, goes on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import hard_limits


def test_requests_are_the_same_every_time_and_cover_the_choices():
    drawn = [hard_limits.draw(number) for number in range(40)]
    assert drawn == [hard_limits.draw(number) for number in range(40)]
    assert {length.architecture for length in drawn} == set(hard_limits.ARCHITECTURES)
    assert {length.method for length in drawn} == {"full", "lora"}
    assert {length.data for length in drawn} == set(hard_limits.DATA)
    assert all(length.hidden % 64 == 0 for length in drawn)


def test_rows_that_are_there_are_found_by_request_and_share(tmp_path):
    rows = [
        {"request": asdict(hard_limits.draw(number)), "share": share}
        for number, share in ((0, 1.0), (0, 0.9))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert set(hard_limits.read_rows(file)) == {(0, 1.0), (0, 0.9)}
    assert hard_limits.read_rows(tmp_path / "none.jsonl") == {}


def test_the_committed_rows_are_of_these_requests():
    file = hard_limits.Path(hard_limits.__file__).parent / "data" / "hard_limits_cpu.jsonl"
    rows = hard_limits.read_rows(file)
    assert set(rows) == {(number, share) for number in range(40) for share in (1.0, 0.9)}
    for (number, _), row in rows.items():
        drawn = asdict(hard_limits.draw(number))
        times = row["request"]["free_mib"] // drawn["free_mib"]  # the machine got more where nothing fitted
        assert row["request"] == drawn | {"free_mib": times * drawn["free_mib"]}
    outcomes = Counter((share, row["outcome"]) for (_, share), row in rows.items())
    assert outcomes[1.0, "ran"] == 40
    assert outcomes[0.9, "out of memory"] >= 36
