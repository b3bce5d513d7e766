"""Time whole plans, from nothing and from the cache, beside another build of autosft.

    python benchmarks/plan_time.py [--beside PYTHON] [--rounds 3] [--json out.json]

Each plan is a process of its own (`python -m autosft plan`) with a cache folder of its own, so that imports
count.  PYTHON is the interpreter of another installation; the two take turns, and what is compared is the
processor time of all threads, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLANS = {
    "7B, three methods": ("--model", "Llama-2-7b", "--hardware", "A100-40GB"),
    "135M, three methods": ("--model", "SmolLM2-135M", "--hardware", "RTX-4060-Laptop"),
    "135M, CPU": ("--model", "SmolLM2-135M", "--hardware", "cpu"),
}
STATES = ("from nothing", "from the cache")


def timed(python: str, arguments: tuple[str, ...], home: Path) -> tuple[float, float]:
    """Run a plan; return its processor time and its wall time in seconds."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_DATA_HOME": str(home / "data"),
        "HF_HUB_OFFLINE": "1",
    }
    before, start = os.times(), time.monotonic()
    subprocess.run(
        [python, "-m", "autosft", "plan", *arguments, "--json"],
        env=environment,
        cwd=home,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4]), time.monotonic() - start


def compiled_first(python: str) -> None:
    """Have Python's own bytecode and the replay's library made before anything is timed."""
    with tempfile.TemporaryDirectory() as home:
        timed(python, ("--model", "SmolLM2-135M", "--hardware", "cpu", "--method", "lora"), Path(home))


def measure(pythons: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each plan, state of the cache and installation."""
    seconds: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for plan, arguments in PLANS.items():
            for build, python in pythons.items():
                with tempfile.TemporaryDirectory() as home:
                    for state in STATES:
                        taken = timed(python, arguments, Path(home))
                        seconds.setdefault((plan, state, build), []).append(taken)
    return [
        {
            "plan": plan,
            "state": state,
            "build": build,
            "processor_s": statistics.median(processor for processor, _ in taken),
            "wall_s": statistics.median(wall for _, wall in taken),
        }
        for (plan, state, build), taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside", help="Python of another installation of autosft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pythons = {"this": sys.executable, **({"other": arguments.beside} if arguments.beside else {})}
    for python in pythons.values():
        compiled_first(python)
    rows = measure(pythons, arguments.rounds)
    print(f"{'plan':22}{'cache':16}{'build':8}{'processor s':>12}{'wall s':>9}{'ratio':>8}")
    for row in rows:
        alike = [other for other in rows if (other["plan"], other["state"]) == (row["plan"], row["state"])]
        ratio = alike[-1]["processor_s"] / row["processor_s"]
        print(
            f"{row['plan']:22}{row['state']:16}{row['build']:8}{row['processor_s']:12.2f}"
            f"{row['wall_s']:9.2f}{ratio:8.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
