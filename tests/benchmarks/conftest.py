"""Lets tests import the benchmarks' modules, and finds the published measurements."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def measurements() -> Path:
    """The folder of published measurements, which is not part of the repository."""
    folder = Path(os.environ.get("AUTOSFT_SHARED", ROOT.parent / "shared")) / "measurements"
    if not folder.is_dir():
        pytest.skip(f"no published measurements in {folder}; set AUTOSFT_SHARED")
    return folder
