"""Check the import contracts of pyproject.toml over a tree, as it is and with one import more each time.

    python import_contracts.py PYPROJECT < violations.json        (in the folder that holds the tree)

The graph is built once, in a process of its own: import-linter does not follow an editable installation.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

import grimp
from importlinter.api import read_configuration
from importlinter.configuration import configure
from importlinter.contracts.acyclic_siblings import AcyclicSiblingsContract
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract

CONTRACTS = {kind.type_name: kind for kind in (AcyclicSiblingsContract, ForbiddenContract, LayersContract)}


def broken(graph: grimp.ImportGraph, options: dict[str, Any]) -> list[str]:
    """Return the names of the contracts that a graph breaks."""
    names = []
    for contract in options["contracts_options"]:
        made = CONTRACTS[contract["type"]](
            name=contract["name"], session_options=options["session_options"], contract_options=contract
        )
        if not made.check(copy.deepcopy(graph), verbose=False).kept:
            names.append(contract["name"])
    return names


def main(config: str, violations: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return what is broken by the tree as it is, then with each (importer, imported) added."""
    configure()
    options = read_configuration(config)
    graph = grimp.build_graph("autosft", include_external_packages=True, cache_dir=None)
    found = [broken(graph, options)]
    for importer, imported in violations:
        changed = copy.deepcopy(graph)
        assert importer in changed.modules, importer
        assert imported in changed.modules, imported
        changed.add_import(importer=importer, imported=imported)
        found.append(broken(changed, options))
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        answer = main(sys.argv[1], json.load(sys.stdin))
    print(json.dumps(answer))
