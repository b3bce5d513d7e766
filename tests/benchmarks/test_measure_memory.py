"""The measuring script, run for real on the CPU with tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measure_memory import read_done
from measured_step import ran_out_of_memory

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "measure_memory.py"


def run(out: Path, *arguments: str) -> list[dict[str, object]]:
    subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def raised(error: Exception, *, handling: Exception | None = None) -> Exception:
    try:
        if handling is not None:
            try:
                raise handling
            except Exception:
                raise error  # noqa: B904
        raise error
    except Exception as caught:
        return caught


#: Each was raised by a library when a step ran under a limit of a few MiB.
OUT_OF_MEMORY = {
    "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "oneDNN": RuntimeError("could not create a primitive"),
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory", "/tmp/folder"),
    "clean-up": raised(KeyError("x"), handling=MemoryError()),
}
OTHERS = {
    "a missing file": OSError(2, "No such file or directory"),
    "a bug": raised(KeyError("loss"), handling=ValueError("shape")),
}


@pytest.mark.parametrize("case", [*OUT_OF_MEMORY, *OTHERS])
def test_an_allocation_that_failed_is_told_from_other_errors(case: str) -> None:
    assert ran_out_of_memory((OUT_OF_MEMORY | OTHERS)[case]) is (case in OUT_OF_MEMORY)


def test_only_what_ended_in_an_error_is_tried_again(tmp_path: Path) -> None:
    rows = [
        {"kind": "machine", "key": "machine"},
        {"kind": "peak", "key": "fitted", "fits": True},
        {"kind": "trial", "key": "did not fit", "fits": False},
        {"kind": "trial", "key": "died", "fits": None, "error": "the process ended with code -11"},
    ]
    out = tmp_path / "measured.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_done(out)) == ["machine", "fitted", "did not fit"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
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
    # False or, where the process died of it, None: an error, which the next run would try again.
    assert trial["fits"] is not True, "48 MiB are too few for any setting"
    trial["fits"] = False
    second = [*first, trial]
    out.write_text("".join(json.dumps(row) + "\n" for row in second))

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
        timeout=600,
        check=False,
    )
    assert checked.returncode in (0, 1), checked.stderr
    assert "rows compared" in checked.stdout
    labels = [json.loads(line)["label"] for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    assert labels in ([], ["bound", "90 %"]), "one measured setting, unless its step is a plain loop's"
