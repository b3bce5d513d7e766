"""Packages that `make test` installs into a folder of their own, since every process would import them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / ".venv" / "optimizers"


def environment() -> dict[str, str]:
    """Return the environment of a process that finds these packages, and no GPU."""
    path = os.pathsep.join([str(PACKAGES), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_again_with_them(request: pytest.FixtureRequest) -> None:
    """Run the test that asks for it in a process that finds the packages; skip it where they are missing."""
    if not PACKAGES.is_dir():
        pytest.skip(f"its packages are not in {PACKAGES.name}: make test installs them there")
    test = f"{request.path}::{request.node.name}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout, done.stdout[-2000:]
