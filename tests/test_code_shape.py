"""What a reader can rely on about the shape of the code: short functions and files, named arguments."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Rooms that are held to these limits.
ROOMS = ("profiles", "workers", "studies", "scheduler", "service", "autosft")
MAX_FUNCTION_LINES = 60  # without its docstring; of a command without its options, a table
MAX_FILE_LINES = 420
MAX_POSITIONAL = 5
#: Tables in the form of a function.
TABLES = {
    "studies/export/tools.py axolotl_fields",
    "studies/migrations/versions/v0001_first.py upgrade",
    "workers/training/sft_config.py sft_config_fields",
}
#: Functions that are called by libraries, whose arguments are theirs.
FOREIGN_SIGNATURES = {
    "profiles/memory/trace/emulation.py _attention",  # torch.nn.functional.scaled_dot_product_attention
    "profiles/memory/trace/row_attention.py row_attention",  # transformers' attention functions
    "profiles/memory/trace/row_attention.py row_mask",  # transformers' mask functions
}


def sources() -> Iterator[tuple[str, str]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def functions(code: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    is_command = any(
        ast.unparse(decorator).startswith(("app.command", "app.callback"))
        for decorator in function.decorator_list
    )
    first = function.body[0].lineno if is_command else function.lineno
    length = (function.end_lineno or 0) - first + 1
    return length if docstring is None else length - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def num_positional(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the arguments that can be given by position, without self."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return len([argument for argument in arguments if argument.arg not in ("self", "cls")])


def test_functions_are_short() -> None:
    long = [
        f"{path} {function.name}"
        for path, code in sources()
        for function in functions(code)
        if num_lines(function) > MAX_FUNCTION_LINES
    ]
    assert set(long) == TABLES


def test_files_are_short() -> None:
    assert not [path for path, code in sources() if code.count("\n") > MAX_FILE_LINES]


def test_more_than_a_few_arguments_have_names() -> None:
    many = [
        f"{path} {function.name}"
        for path, code in sources()
        for function in functions(code)
        if num_positional(function) > MAX_POSITIONAL
    ]
    assert set(many) == FOREIGN_SIGNATURES


@pytest.mark.parametrize(
    ("code", "lines", "positional"),
    [
        ("def f():\n    return 1", 2, 0),
        ('def f(a, /, b, *, c):\n    """Do.\n\n    More.\n    """\n    return 1', 2, 2),
        ("@app.command('f')\ndef f(\n    *,\n    a,\n):\n    return 1", 1, 0),
        ("class A:\n    def f(self, a):\n        x = 1\n        return x", 3, 1),
    ],
)
def test_shapes_are_measured(code: str, lines: int, positional: int) -> None:
    [function] = functions(code)
    assert (num_lines(function), num_positional(function)) == (lines, positional)


def test_no_two_test_files_have_one_name() -> None:
    """Without packages, pytest imports each as a module of its bare name, and refuses the second."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
