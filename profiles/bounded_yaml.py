"""Read YAML from untrusted files, with limits on size, depth and aliases."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from autosft.profiles.errors import UserError

#: The largest file that is read; an exported configuration has about 20 KB.
MAX_BYTES = 1 << 20
#: The maximum depth of nesting, and number of values after resolving aliases.
MAX_DEPTH = 50
MAX_NODES = 100_000
#: Characters of a whole number; one of 309 digits is beyond every float, which settings are.
MAX_DIGITS = 100
_INTEGER = "tag:yaml.org,2002:int"


def read_bounded(path: Path) -> str:
    """Return a YAML file's text.  Raises UserError for a file that is too large."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{path} is larger than {MAX_BYTES >> 20} MiB, the most that is read of a YAML file.",
            remedy="It is most likely another file.",
        )
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what PowerShell's > writes
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def construct(loader: yaml.SafeLoader, *, change: Callable[[yaml.Node], object] = lambda _: None) -> Any:
    """Construct a loader's only document, after applying `change` to its nodes.

    Raises yaml.MarkedYAMLError, also for excessive nesting, growth by aliases, and numbers that Python
    rejects: the file is untrusted.
    """
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_excess(node)
        change(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep") from error
    except (ValueError, OverflowError, TypeError) as error:
        raise yaml.MarkedYAMLError(problem=str(error)) from error


def _refuse_excess(root: yaml.Node) -> None:
    """Raise MarkedYAMLError for a document that is too deep, or too large after resolving aliases."""
    sizes: dict[int, int] = {}  # of nodes that have been added up
    above: set[int] = set()
    work: list[tuple[yaml.Node, bool]] = [(root, False)]
    while work:
        node, is_done = work.pop()
        if node.tag == _INTEGER and len(node.value) > MAX_DIGITS:
            problem = f"is a whole number of {len(node.value):,} digits, more than {MAX_DIGITS}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        children = _children(node)
        if is_done:
            above.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes.get(id(child), 1) for child in children)
            if sizes[id(node)] > MAX_NODES:
                problem = f"comes to more than {MAX_NODES:,} values"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            continue
        if id(node) in above:
            raise yaml.MarkedYAMLError(problem="contains itself", problem_mark=node.start_mark)
        if id(node) in sizes or not children:
            continue
        if len(above) >= MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        above.add(id(node))
        work.append((node, True))
        work += [(child, False) for child in children]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
