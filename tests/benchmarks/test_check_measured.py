"""Comparing measured runs with predictions, on made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path

import check_measured
import pytest

MACHINE = {"kind": "machine", "device": "cuda", "capability": [9, 0], "gpu": "a test", "versions": {}}
SAID = check_measured.Predicted(allocated=1000, need=1100, reserved=1200)


def row(kind: str, **values: object) -> dict[str, object]:
    return {"kind": kind, "setting": {"step": "trl"}, "fits": True, "label": "", **values}


CASES = [
    ("peaks as predicted", [row("peak", peak_allocated_bytes=1000, peak_reserved_bytes=1200)], 0),
    ("peaks far off", [row("peak", peak_allocated_bytes=900, peak_reserved_bytes=1200)], 1),
    ("need as predicted", [row("need", need_bytes=1105)], 0),
    ("said to fit and did not", [row("trial", cap_bytes=2000, fits=False)], 1),
    ("said not to fit and did", [row("trial", cap_bytes=1110)], 0),
    ("dies at its bound", [row("cap", label="bound", cap_bytes=1188, fits=False)], 1),
    ("lives on 90 %", [row("cap", label="90 %", cap_bytes=990)], 1),
    ("dies on 90 %", [row("cap", label="90 %", cap_bytes=990, fits=False)], 0),
]


@pytest.mark.parametrize(("rows", "code"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_goals_are_judged(
    rows: list[dict[str, object]], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_measured, "predict", lambda setting, machine: SAID)
    path, caps = tmp_path / "measured.jsonl", tmp_path / "caps.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in (MACHINE, *rows)))
    assert check_measured.check(path, caps) == code
    asked = [json.loads(line) for line in caps.read_text().splitlines()]
    expected = [("bound", 1188), ("90 %", 990)] if rows[0]["kind"] == "peak" else []
    assert [(item["label"], item["cap_bytes"]) for item in asked] == expected


def test_a_setting_that_cannot_be_predicted_hides_no_other(tmp_path: Path, capsys) -> None:
    path = tmp_path / "measured.jsonl"
    rows = [MACHINE, row("peak"), row("peak", setting={"step": "plain"})]
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    assert check_measured.check(path) == 0
    assert "0 rows compared" in capsys.readouterr().out
