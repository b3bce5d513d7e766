"""What is built is what is in the tree, and the layers hold in what is built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {
    folder: package for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
}  # e.g. "studies": "autosft.studies"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build sdist -> wheel from a copy of the tree, as an installer would."""
    copy = tmp_path_factory.mktemp("tree") / "autosft"
    copy.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    built = copy.parent / "dist"
    for options in (["--sdist", str(copy)], ["--wheel", "{unpacked}"]):
        if options[1] == "{unpacked}":
            [sdist] = built.glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                # Python before 3.11.4, such as Debian 12's, has no filters.
                safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                archive.extractall(copy.parent, **safely)
            options[1] = str(copy.parent / sdist.name.removesuffix(".tar.gz"))
        # Without isolation: no network, and the setuptools that constraints.txt pins.
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), *options]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    [path] = built.glob("*.whl")
    return path


def files_in_tree() -> set[str]:
    """Return every file of the packages by the path that it has once installed."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tree = files_in_tree()
    assert tree - packed == set(), (
        "missing in the wheel: list the package or the kind of file in pyproject.toml"
    )
    assert packed - tree == set()


def test_the_wheel_brings_the_console_script(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "autosft = autosft.cli:main" in archive.read(name).decode()


def test_every_dependency_says_what_it_is_for():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    listed = [line.strip() for line in lines[lines.index("dependencies = [") + 1 :]]
    listed = listed[: listed.index("]")]
    assert len(listed) == len(PROJECT["project"]["dependencies"])
    assert [line for line in listed if "  # " not in line] == []


def test_constraints_pin_every_dependency():
    pinned = {
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["postgres"]]
    names = {item.partition(">")[0].partition("[")[0].strip().lower() for item in wanted}
    assert names - pinned == set()
