"""The package finds its parts in a checkout, installed or not, and takes no neighbour's for its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("profiles", "studies", "workers", "scheduler", "service")


def import_from(root: Path, module: str) -> subprocess.CompletedProcess[str]:
    """Import a module with `root` first on the path and nothing installed, not even this checkout."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {module} as found; print(found.__file__)"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("part", PARTS)
def test_a_checkout_is_whole_without_being_installed(part: str) -> None:
    done = import_from(ROOT, f"autosft.{part}")
    assert done.stdout.strip() == str(ROOT / part / "__init__.py"), done.stderr


def test_in_an_installed_tree_nothing_is_added(tmp_path: Path) -> None:
    """Beside an installed package stand those of others, a `profiles` perhaps."""
    (tmp_path / "autosft").mkdir()
    shutil.copy(ROOT / "autosft" / "__init__.py", tmp_path / "autosft")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "__init__.py").touch()
    assert "No module named 'autosft.profiles'" in import_from(tmp_path, "autosft.profiles").stderr
    for part in PARTS:
        (tmp_path / "autosft" / part).mkdir()
        (tmp_path / "autosft" / part / "__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    for part in PARTS:
        done = import_from(tmp_path, f"autosft.{part}")
        assert done.stdout.strip() == str(tmp_path / "autosft" / part / "__init__.py"), done.stderr
