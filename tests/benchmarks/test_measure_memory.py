"""The measuring script, run for real on the CPU with tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "measure_memory.py"


def run(out: Path, *arguments: str) -> list[dict[str, object]]:
    subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_dry_run_measures_caps_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "measured.jsonl"

    first = run(out, "--settings", "1", "--trials", "0")
    assert [row["kind"] for row in first] == ["machine", "peak"]
    assert first[1]["fits"] is True
    assert 20 << 20 < first[1]["peak_resident_bytes"] < 1 << 30  # type: ignore[operator]

    second = run(out, "--settings", "1", "--trials", "1")
    assert second[:2] == first, "what was measured is not measured again"
    (trial,) = second[2:]
    assert trial["kind"] == "trial"
    # False or, where a library words it in a way of its own, None: an error.
    assert trial["fits"] is not True, "48 MiB are too few for any setting"

    caps = tmp_path / "caps.jsonl"
    asked = {"setting": trial["setting"], "cap_bytes": 4 << 30, "label": "upper"}
    caps.write_text(json.dumps(asked) + "\n")
    third = run(out, "--settings", "1", "--trials", "1", "--caps", str(caps))
    assert third[:3] == second
    assert [(row["kind"], row["label"], row["fits"]) for row in third[3:]] == [("cap", "upper", True)]

    checked = subprocess.run(
        [sys.executable, str(SCRIPT), "--check", str(out), "--caps-out", str(tmp_path / "next.jsonl")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    assert checked.returncode in (0, 1), checked.stderr
    assert "rows compared" in checked.stdout
    labels = [json.loads(line)["label"] for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    assert labels in ([], ["bound", "90 %"]), "one measured setting, unless its step is a plain loop's"
