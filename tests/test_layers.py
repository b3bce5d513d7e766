"""Who may import whom: the contracts in pyproject.toml, over the tree as it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE_DIR = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
    "package-dir"
]


@pytest.fixture
def installed(tmp_path) -> Path:
    """Lay the tree out as an installation does; import-linter does not follow the editable finder."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package, folder in PACKAGE_DIR.items():
        target = tmp_path / package.replace(".", "/")
        shutil.copytree(ROOT / folder, target, ignore=ignored, dirs_exist_ok=True)
    return tmp_path


def check(installed: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    options = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run([*command, *options], cwd=installed, capture_output=True, text=True, check=False)


def test_the_layers_hold(installed):
    ended = check(installed)
    assert ended.returncode == 0, ended.stdout + ended.stderr


VIOLATIONS = {
    "upwards": ("studies/trial.py", "import autosft.workers.runner", "layers"),
    "into the command line": ("scheduler/events.py", "import autosft.ui.live_view", "layers"),
    "ray elsewhere": ("scheduler/loop/tuning.py", "import ray", "ray only"),
    "optuna elsewhere": ("workers/runner.py", "import optuna", "optuna only"),
    "torch elsewhere": ("scheduler/loop/tuning.py", "import torch", "torch only"),
}


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_found(installed, file, line, contract):
    with (installed / "autosft" / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    ended = check(installed)
    assert ended.returncode != 0
    [broken] = [one for one in ended.stdout.splitlines() if " BROKEN" in one]
    assert broken.startswith(contract)
