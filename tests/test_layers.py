"""Who may import whom: the contracts in pyproject.toml, over the tree as it is installed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


#: What breaks each contract: an import that must not be.
VIOLATIONS = {
    "layers: command line > service > scheduler > workers > studies > profiles": [
        ("studies.trial", "workers.runner"),
        ("scheduler.events", "ui.live_view"),
        ("profiles.units", "studies.wire"),
        ("scheduler.events", "service.values"),
    ],
    "rooms of service": [
        ("service.values", "service.store.queue_store"),
        ("service.decide.shares", "service.store.usage"),
        ("service.drivers.command", "service.loop"),
        ("service.live", "service.loop_child"),
    ],
    "rooms of scheduler": [
        ("scheduler.study_run", "scheduler.loop.state"),
        ("scheduler.decide.placement", "scheduler.study_run"),
        ("scheduler.plan.method_plan", "scheduler.loop.state"),
        ("scheduler.setup.folders", "scheduler.finish.conclusion"),
    ],
    "modules of scheduler.loop": [
        ("scheduler.loop.state", "scheduler.loop.fleet"),
        ("scheduler.loop.attempts", "scheduler.loop.results"),
        ("scheduler.loop.launch", "scheduler.loop.results"),
    ],
    "rooms of workers": [
        ("workers.processes.failures", "workers.runners.attempt_monitor"),
        ("workers.scoring.evaluation", "workers.training.load"),
    ],
    "rooms of studies": [
        ("studies.search.space", "studies.store.rows"),
        ("studies.store.rows", "studies.report.page"),
    ],
    "rooms of profiles": [
        ("profiles.recipe", "profiles.hardware.device"),
        ("profiles.model.files", "profiles.dataset.readers"),
    ],
    "rooms of profiles.memory": [
        ("profiles.memory.program.blocks", "profiles.memory.trace.recorder"),
    ],
    "ray only where trials are placed and run": [("scheduler.loop.tuning", "ray")],
    "optuna only in studies": [("workers.runner", "optuna")],
    "torch only in workers and profiles": [("scheduler.loop.tuning", "torch")],
}
#: Imports that close a circle among modules of one room: no layer forbids them.
CIRCLES = [
    ("studies.search.dimensions", "studies.search.space"),
    ("profiles.memory.program.blocks", "profiles.memory.program.run"),
    ("commands.options", "commands.tune"),
]


def full(module: str) -> str:
    is_ours = module.partition(".")[0] in (
        "commands",
        "profiles",
        "scheduler",
        "service",
        "studies",
        "ui",
        "workers",
    )
    return f"autosft.{module}" if is_ours else module


CASES = [
    (name, full(importer), full(imported))
    for name, imports in VIOLATIONS.items()
    for importer, imported in imports
]
CASES += [
    ("no circle: not among packages, not among modules", full(importer), full(imported))
    for importer, imported in CIRCLES
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Return the contracts that are broken by the tree as it is, then with the import of each case."""
    tree = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns("__pycache__")
    for package, folder in CONFIG["setuptools"]["package-dir"].items():
        target = tree / package.replace(".", "/")
        shutil.copytree(ROOT / folder, target, ignore=ignored, dirs_exist_ok=True)
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "import_contracts.py"), str(ROOT / "pyproject.toml")],
        input=json.dumps([case[1:] for case in CASES]),
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: list[list[str]] = json.loads(ended.stdout)
    return found


def test_the_tree_keeps_every_contract(broken: list[list[str]]) -> None:
    assert broken[0] == [], "`make lint` says which import it is"


@pytest.mark.parametrize("at", range(len(CASES)), ids=[f"{case[1]} -> {case[2]}" for case in CASES])
def test_a_forbidden_import_is_found(broken: list[list[str]], at: int) -> None:
    assert CASES[at][0] in broken[1 + at]


def test_each_contract_is_broken_by_a_case() -> None:
    contracts = {contract["name"] for contract in CONFIG["importlinter"]["contracts"]}
    assert contracts == {case[0] for case in CASES}


def test_a_new_room_has_to_be_given_its_floor() -> None:
    for contract in CONFIG["importlinter"]["contracts"]:
        assert contract["type"] != "layers" or contract["exhaustive"]


#: What a pure decider has no use for: clocks, chance, processes, files and the database.
STORES = ("autosft.studies.store", "autosft.service.store")
IMPURE = {"os", "time", "random", "secrets", "shutil", "socket", "subprocess", "tempfile"}


@pytest.mark.parametrize(
    "path",
    sorted(path for room in ("scheduler", "service") for path in (ROOT / room / "decide").glob("*.py")),
    ids=lambda path: f"{path.parts[-3]}.{path.stem}",
)
def test_deciders_have_no_clock_no_chance_and_no_database(path: Path) -> None:
    assert impure_imports(path.read_text(encoding="utf-8")) == []


def test_an_impure_decider_would_be_seen() -> None:
    assert impure_imports("import os\nfrom autosft.studies.store.records import open_records\n") == [
        "os",
        "autosft.studies.store.records",
    ]


def impure_imports(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found += [name for name in names if name in IMPURE or name.startswith(STORES)]
    return found
