"""Each part of the loop's state is written by one module of `scheduler.loop`: its docstring says which."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.scheduler.loop import state

FOLDER = Path(state.__file__).parent
MUTATORS = {"add", "append", "clear", "discard", "extend", "pop", "remove", "setdefault", "update"}
#: Name of a part in Loop -> the module that writes it.
OWNERS = {
    part.name: found[1]
    for part in dataclasses.fields(state.Loop)
    if (kind := getattr(state, str(part.type), None)) is not None
    and (found := re.search(r"Written by `(\w+)`", kind.__doc__ or "")) is not None
}
ATTEMPT_FIELDS = {field.name for field in dataclasses.fields(state.RunningAttempt)}


def writes(source: str) -> Iterator[str]:
    """Yield the parts of the loop that a module writes, "attempts" for what it writes of an attempt."""
    tree = ast.parse(source)
    aliases = dict(pair for node in ast.walk(tree) for pair in aliases_in(node))
    for node in ast.walk(tree):
        for target in written_by(node):
            names = chain(target)
            if len(names) > 1 and names[0] == "attempt" and names[1] in ATTEMPT_FIELDS:
                yield "attempts"
            if names and names[0] in aliases:
                names = ["loop", aliases[names[0]], *names[1:]]
            if len(names) > 2 and names[0] == "loop":
                yield names[1]


def written_by(node: ast.AST) -> list[ast.expr]:
    """Return what a node writes to: targets of assignments and deletions, and objects of mutating calls."""
    match node:
        case ast.Assign(targets=targets) | ast.Delete(targets=targets):
            return [
                part
                for target in targets
                for part in (target.elts if isinstance(target, ast.Tuple) else [target])
            ]
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
            return [target]
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in MUTATORS:
            return [value]
    return []


def aliases_in(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (name, part) for `name = loop.part`, in tuples too."""
    if not isinstance(node, ast.Assign):
        return
    [target] = node.targets
    names, values = [target], [node.value]
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        names, values = target.elts, node.value.elts
    for name, value in zip(names, values, strict=False):
        parts = chain(value)
        if isinstance(name, ast.Name) and len(parts) == 2 and parts[0] == "loop":
            yield name.id, parts[1]


def chain(node: ast.expr) -> list[str]:
    """Return the names of `a.b[c].d`: a, b, d; empty where it does not begin with a name."""
    names: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif not isinstance(node, ast.Subscript):
            return []
        node = node.value
    return [node.id, *reversed(names)]


def test_every_part_that_changes_names_its_owner() -> None:
    parts = {
        part.name
        for part in dataclasses.fields(state.Loop)
        if part.default_factory is not dataclasses.MISSING
    }
    assert set(OWNERS) == parts - {"idle"}, "idle has methods of its own"
    assert all((FOLDER / f"{owner}.py").is_file() for owner in OWNERS.values())


@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_only_the_owner_writes_a_part(module: str) -> None:
    for part in writes((FOLDER / f"{module}.py").read_text(encoding="utf-8")):
        assert OWNERS.get(part) == module, f"{module} writes loop.{part} of {OWNERS.get(part)}"


def test_owners_write_what_they_own() -> None:
    for part, owner in OWNERS.items():
        assert part in set(writes((FOLDER / f"{owner}.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        "loop.user.is_paused = True",
        "loop.user.num_done += 1",
        "loop.user.paused_trials.add(3)",
        "del loop.user.paused_trials[3]",
        "user = loop.user\nuser.polled_at = 1.0",
        "a, user = 1, loop.user\nuser.polled_at = 1.0",
    ],
)
def test_a_write_is_noticed(line: str) -> None:
    assert set(writes(line)) == {"user"}
    assert set(writes("attempt.ends_at = 3.0")) == {"attempts"}
    assert set(writes("print(loop.user.is_paused, loop.user.paused_trials)")) == set()
