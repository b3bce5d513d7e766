"""`autosft --help` is there at once, since nothing heavy is imported for it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "ray",
    "optuna",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "sqlalchemy",
    "scipy",
    "pydantic",
}

#: Processor time, which other processes on the machine hardly change.  The goal is 0.3 s; the factor is for
#: slow machines and caches that others have emptied.
MAX_HELP_S = 0.3
BUSY_FACTOR = 2.0


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_nothing_heavy_is_imported_to_help(arguments):
    program = (
        "import sys; from autosft.cli import main; code = main(sys.argv[1:]);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert HEAVY & set(ended.stderr.split()) == set()


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, autosft; print(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert HEAVY & set(ended.stdout.split()) == set()


def test_help_starts_fast():
    def seconds(*command: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])  # of children that have ended

    seconds("-m", "autosft", "--help")  # compiles and reads from disk
    beyond_s = statistics.median(seconds("-m", "autosft", "--help") - seconds("-c", "pass") for _ in range(7))
    assert beyond_s < MAX_HELP_S * BUSY_FACTOR


@pytest.mark.slow
def test_a_known_plan_imports_no_model_library(tmp_path):
    program = (
        "import sys; from autosft.cli import main; code = main(sys.argv[1:]);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    plan = ["plan", "--model", "SmolLM2-135M", "--hardware", "T4", "--method", "lora", "--json"]
    first, again = (
        subprocess.run(
            [sys.executable, "-c", program, *plan],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        for _ in range(2)
    )
    assert again.stdout == first.stdout
    assert "torch" in first.stderr.split()
    assert {"torch", "transformers", "trl", "peft"} & set(again.stderr.split()) == set()
