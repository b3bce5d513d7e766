"""Commands of ours as a user starts them: processes with data and cache folders of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command of ours with its data and cache below `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from autosft.cli import main; sys.exit(main())", *arguments],
        env={
            **os.environ,
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> list[Any]:
    """Run a command of ours to its end; return the JSON that it writes."""
    with start(folder, *arguments) as process:
        try:
            output, errors = process.communicate(timeout=840)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, errors
    return read_json(output)


def read_json(output: str) -> list[Any]:
    """Read a JSON list, one object, or an object a line."""
    try:
        read = json.loads(output)
    except json.JSONDecodeError:
        return [json.loads(line) for line in output.splitlines()]
    return read if isinstance(read, list) else [read]
