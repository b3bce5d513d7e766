"""`autosft check-sparsity`: counts zero weights, and checks that a trained model kept them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosft.commands.options import AsJson, Command, Quiet, application, teach, write_json
from autosft.ui.terminal import new_console

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from autosft.profiles.model.sparsity import ModelSparsity

app = application()
FAILED = 1


@app.command(
    "check-sparsity",
    cls=Command,
    help=teach(
        "Count a model's zero weights by layer, and check that a trained model kept them.",
        "autosft check-sparsity ./llama-pruned                  one model",
        "autosft check-sparsity ./llama-pruned ./trained        before and after",
    ),
    epilog="Exit code 1 if AFTER has lost zeros.  Train with --method sparse to keep them.",
)
def check_sparsity(
    *,
    before: Annotated[str, typer.Argument(metavar="FOLDER", help="Model folder.")],
    after: Annotated[str | None, typer.Argument(metavar="AFTER", help="The model after training.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Count a model's zero weights by layer, and check that a trained model kept them."""
    from rich.progress import Progress

    from autosft.profiles.model.sparsity import num_lost, read_sparsity

    console, notes = new_console(), new_console(stderr=True)
    folders = [folder for folder in (before, after) if folder is not None]
    with Progress(console=notes, transient=True, disable=quiet or as_json) as bar:
        models = []
        for folder in folders:
            models.append(read_sparsity(folder, progress=shown_on(bar, f"Reading {folder}")))
    lost = num_lost(before, after) if after is not None else 0
    if as_json:
        write_json({"models": [facts(*pair) for pair in zip(folders, models, strict=True)], "num_lost": lost})
    else:
        if not quiet:
            console.print(table(models))
        for folder, model in zip(folders, models, strict=True):
            console.print(describe_sparsity(folder, model), soft_wrap=True)
        if after is not None:
            console.print(f"{lost:,} zeros were lost." if lost else "Every zero was kept.")
    if lost:
        raise typer.Exit(FAILED)


def shown_on(bar: Progress, label: str) -> Callable[[float], None]:
    """Return a callback that shows a task's progress."""
    task = bar.add_task(label, total=1.0)
    return lambda share: bar.update(task, completed=share)


def describe_sparsity(folder: str, model: ModelSparsity) -> str:
    """Describe the model's sparsity in a sentence."""
    if not model.pruned:
        return f"{folder}: dense, {model.share:.4f} of all weights are zero."
    return (
        f"{folder}: {model.pruned_share:.4f} of {len(model.pruned)} pruned matrices are zero "
        f"({model.pattern}), {model.share:.4f} of all weights."
    )


def facts(folder: str, model: ModelSparsity) -> dict[str, Any]:
    return {
        "folder": folder,
        "share": model.share,
        "pruned_share": model.pruned_share,
        "num_pruned_matrices": len(model.pruned),
        "pattern": model.pattern,
        "matrices": [
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "num_zeros": matrix.num_zeros,
                "share": matrix.share,
                "pattern": matrix.pattern,
            }
            for matrix in model.matrices
        ],
    }


def table(models: list[ModelSparsity]) -> Table:
    """Return a table with a row per layer, and for the weights outside of layers."""
    from rich import box
    from rich.table import Table

    from autosft.profiles.model.sparsity import share_of

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("layer")
    made.add_column("matrices", justify="right")
    for heading in ("zero", "zero after")[: len(models)]:
        made.add_column(heading, justify="right")
    made.add_column("pattern")
    layers = list(dict.fromkeys(matrix.layer for matrix in models[0].matrices))
    for layer in sorted(layers, key=lambda name: (not name.isdigit(), name.zfill(9))):
        groups = [tuple(matrix for matrix in model.matrices if matrix.layer == layer) for model in models]
        patterns = sorted({matrix.pattern for matrix in groups[0]} - {"dense"})
        made.add_row(
            layer,
            str(len(groups[0])),
            *(f"{share_of(group):.4f}" for group in groups),
            ", ".join(patterns) or "dense",
        )
    return made
