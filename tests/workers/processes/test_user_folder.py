"""A file of the user's in the current folder is taken for no module, by whichever process of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.user_code import find, load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

#: Names of Python's own modules, some of them imported before anything of ours, and of packages that we use.
NAMES = (
    *("queue", "random", "types", "tempfile", "json", "select", "socket", "secrets", "statistics", "token"),
    *("datasets", "trl", "peft", "torch", "transformers", "ray", "numpy", "yaml", "typer", "rich", "psutil"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a module of each name that says it was imported."""
    for name in NAMES:
        mark = f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n"
        (tmp_path / f"{name}.py").write_text(f"{mark}raise RuntimeError('of the user')\n")
    return tmp_path


def imported(folder: Path) -> str:
    path = folder / "imported"
    return path.read_text() if path.exists() else ""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


WAYS = {
    "code": python("-c", f"import {', '.join(name for name in NAMES if name not in ('trl', 'torch'))}"),
    "answers": python("-m", "autosft.workers.scoring.inference_server"),
    "torch probe": python("-m", "autosft.profiles.hardware.torch_probe"),
    "python -m autosft": [sys.executable, "-m", "autosft", "studies", "--help"],
    "warm server": python(
        "-c",
        textwrap.dedent("""
            from pathlib import Path
            from autosft.workers.processes.starters import WarmServer, call
            server = WarmServer(imports=["queue", "random", "datasets", "yaml"])
            log = Path("log").absolute()
            arguments = {"exclusive_upper_bound": 1}
            assert call(server, "secrets:randbelow", arguments, num_threads=1, log=log) == 0
            server.close()
        """),
    ),
    "cold starter": python(
        "-c",
        textwrap.dedent("""
            from pathlib import Path
            from autosft.workers.processes.starters import ColdStarter, call
            log = Path("log").absolute()
            arguments = {"exclusive_upper_bound": 1}
            assert call(ColdStarter(), "secrets:randbelow", arguments, num_threads=1, log=log) == 0
        """),
    ),
    "Ray": python(
        "-c",
        textwrap.dedent("""
            import ray
            from autosft.scheduler.cluster.ray_cluster import start_local

            def places():
                import datasets, queue, random, sys, yaml
                return [module.__file__ for module in (datasets, queue, random, yaml)], sys.path

            with start_local(imports=[]) as cluster:
                cluster.wait_until_ready()
                files, path = ray.get(ray.remote(places).remote())
                import os
                assert os.getcwd() not in path, path
        """),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_process_of_ours_imports_it(way: str, folder: Path) -> None:
    done = run(folder, *WAYS[way])
    assert imported(folder) == ""
    assert done.returncode == 0, done.stderr


def test_the_example_would_notice(folder: Path) -> None:
    run(folder, sys.executable, "-c", "import queue")
    assert imported(folder) == "queue "


def test_there_is_no_other_way_to_start_a_python() -> None:
    """Whoever starts one goes through `child_python`; the watchdog is isolated (-I) altogether."""
    ours = ("autosft", "profiles", "studies", "workers", "scheduler")
    found = {
        path.relative_to(ROOT).as_posix(): re.findall(r".*sys\.executable.*", path.read_text())
        for name in ours
        for path in (ROOT / name).rglob("*.py")
    }
    starting = {path: [line.strip() for line in lines] for path, lines in found.items() if lines}
    assert set(starting) == {"profiles/child_python.py", "scheduler/cluster/run_folder.py"}
    assert all('"-I"' in line for line in starting["scheduler/cluster/run_folder.py"])


# The user's own code


LOSS = "import sibling\n\ndef loss(outputs, labels, num_items_in_batch=None):\n    return sibling.VALUE\n"


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (folder / "helper.py").write_text(LOSS)
    (folder / "sibling.py").write_text("VALUE = 1\n")
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "inner.py").write_text("def loss(outputs, labels, num_items_in_batch=None): ...\n")
    monkeypatch.chdir(folder)
    before, path = set(sys.modules), list(sys.path)
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["helper:loss", "package.inner:loss"])
def test_the_users_code_is_found_from_anywhere(
    name: str, here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = find(name, flag="--loss")
    assert code.folder == str(here)
    assert sys.path[0] != str(here), "its folder comes last"
    sys.path.remove(str(here))
    for module in ("helper", "sibling", "package", "package.inner"):
        sys.modules.pop(module, None)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load(code, flag="--loss").__name__ == "loss"
    assert imported(here) == ""


@pytest.mark.parametrize("name", ["queue", "datasets", "trl"])
def test_a_file_with_the_name_of_another_module_is_refused(name: str, here: Path) -> None:
    with pytest.raises(UserError, match="has the name of another module"):
        find(f"{name}:loss", flag="--loss")
    assert imported(here) == ""


def test_installed_code_has_no_folder(here: Path) -> None:
    assert find("math:fsum", flag="--loss").folder == ""
