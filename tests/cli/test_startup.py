"""`autosft --help` is there at once, since nothing heavy is imported for it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

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

#: The goal is 0.3 s on an idle machine; the factor is for machines that run tests side by side.
MAX_HELP_S = 0.3
BUSY_FACTOR = 3.0


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
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - started

    seconds("-m", "autosft", "--help")  # compiles and reads from disk
    beyond_s = statistics.median(seconds("-m", "autosft", "--help") - seconds("-c", "pass") for _ in range(7))
    assert beyond_s < MAX_HELP_S * BUSY_FACTOR
