"""The command line: dispatches to a command and turns every failure into one message and an exit code.

Each command is a module of `autosft.commands`, imported only when it runs: `autosft --help` imports typer and
nothing else.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Abort, TyperException
from typer.main import get_command

from autosft.profiles.errors import InterruptedRunError, StorageError, StudyFailedError, UserError
from autosft.ui.terminal import guarded_output

#: Maximum number of characters of a message: an invalid value need not be shown in full.
_LONGEST = 2000

DONE, FAILED, WRONG_REQUEST, STOPPED = 0, 1, 2, 130
INTERRUPTED = 75  # as sysexits.h has it: a temporary failure

SUMMARIES = {
    "tune": "Find the best fine-tuning run for a model and a data set on this machine.",
    "train": "Train a single configuration, such as a study's best.yaml.",
    "plan": "Show what fits: memory, speed and time of each method, without training or weights.",
    "profile": "Measure and show the devices: free memory, capabilities, running processes.",
    "data": "Inspect training data: counts, lengths, and which tokens a model learns.",
    "studies": "List, show, compare, rename, delete and export studies; control a running one.",
    "check-sparsity": "Count the zeros of a pruned model and check that training kept them.",
    "evaluate": "Score models side by side: loss, perplexity, IFEval, lm-eval tasks, your own function.",
    "doctor": "Check this machine for what slows fine-tuning down or breaks it, with remedies.",
    "export": "Export a study's best configuration for autosft, another tool, or the hub.",
    "report": "Write a study's report as one HTML file that works offline.",
    "chat": "Talk with models side by side in the terminal.",
    "dashboard": "Open the Optuna dashboard on the study database.",
    "serve": "Serve a queue of studies on this machine's devices, for one person or many.",
    "queue": "Show and change the queue of a server: what runs, what waits, why, and until when.",
    "submit": "Run a command on an existing Ray cluster, or put it into the queue of a server.",
    "jobs": "List, follow and stop jobs on a Ray cluster.",
}


class Commands(TyperGroup):
    """All commands by name and summary; a command is imported when it runs."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, short_help=summary) for name, summary in SUMMARIES.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None, "click has found the command by its name"
        module = importlib.import_module(module_name(name))
        return name, get_command(module.app), rest


def module_name(command: str) -> str:
    """Return the name of the module that implements a command."""
    return f"autosft.commands.{command.replace('-', '_')}"


def show_version(is_asked: bool) -> None:
    if is_asked:
        from autosft import __version__

        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Start with the built-in demo:  autosft tune",
)


@app.callback()
def root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Supervised fine-tuning, tuned for the GPUs you have: what fits, what learns best, which checkpoint
    to keep.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 invalid request, 130 stopped by the user.

    75 is a failure of what it needs, after which the same command goes on.

    Anything a user can cause ends in one message on stderr.  Everything else is a bug in autosft: its
    traceback goes into a file that the message names.
    """
    from autosft.profiles.masking import keep_loopback_direct

    keep_loopback_direct()
    with guarded_output():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(given: Sequence[str]) -> int:
    try:
        # Outside standalone mode typer returns the command's value, or the code of a `typer.Exit`.
        code = app(list(given) or ["--help"], prog_name="autosft", standalone_mode=False)
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
    except TyperException as error:
        return complain(*rephrased(error), code=WRONG_REQUEST)
    except UserError as error:
        return complain(
            error.message, error.remedy, code=INTERRUPTED if ends_no_item(error) else WRONG_REQUEST
        )
    except (KeyboardInterrupt, Abort):
        code = STOPPED
    except BrokenPipeError:
        leave_without_flushing(FAILED)
    except Exception as error:
        return complain(
            *failure(error), code=INTERRUPTED if isinstance(error, InterruptedRunError) else FAILED
        )
    if code == STOPPED:  # also what typer makes of KeyboardInterrupt
        return complain("stopped", None, code=STOPPED, kind="")
    return code if isinstance(code, int) else DONE


def ends_no_item(error: UserError) -> bool:
    """Whether an item of a queue goes on after this: its database, which it was claimed in, went away."""
    database = sys.modules.get("autosft.studies.store.database")
    return (
        "AUTOSFT_QUEUE_ITEM" in os.environ
        and database is not None
        and isinstance(error, database.DatabaseError)
    )


def complain(message: str, remedy: str | None, *, code: int, kind: str = "error: ") -> int:
    """Print an error and, indented below it, the remedy."""
    indent = "\n" + " " * len(kind)
    from autosft.profiles.masking import masked

    parts = [f"{part[:_LONGEST]}…" if len(part) > _LONGEST else part for part in (message, remedy) if part]
    text = kind + indent.join(part.replace("\n", indent) for part in parts)
    print(masked(text), file=sys.stderr)  # noqa: T201
    return code


def rephrased(error: TyperException) -> tuple[str, str | None]:
    """Rephrase a typer error in the style of our own errors."""
    nearest = difflib.get_close_matches(
        getattr(error, "option_name", ""), getattr(error, "possibilities", None) or (), n=1
    )
    message = " ".join((error.message if nearest else error.format_message()).split())
    message, _, proposal = message.partition(" Did you mean ")  # of a command
    message = message.replace("Value error, ", "")
    if nearest or proposal:
        remedy: str | None = f"Did you mean {nearest[0] if nearest else proposal.rstrip('?')}?"
    else:
        context = getattr(error, "ctx", None)
        remedy = None if context is None else f"See {context.command_path} --help."
    return message[:1].lower() + message[1:].rstrip(".") + ".", remedy


def failure(error: Exception) -> tuple[str, str | None]:
    """Return message and remedy for a failure of the work itself; save the traceback of an unexpected one."""
    if isinstance(error, StudyFailedError | StorageError):
        return str(error), None
    if isinstance(error, OSError) and error.strerror:  # a full disk, a file that may not be read
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}.", f"The details are in {write_traceback(error)}"
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__,
        f"This is a bug in autosft. The traceback is in {write_traceback(error)}",
    )


def write_traceback(error: Exception) -> str:
    """Write the traceback of `error` to the user's log folder, else a temporary folder; return its path."""
    import tempfile
    import time
    import traceback
    from pathlib import Path

    import platformdirs

    from autosft.profiles.masking import masked, masked_command

    text = "".join(traceback.format_exception(error))
    name = time.strftime("error-%Y%m%d-%H%M%S.log")
    for folder in (platformdirs.user_log_path("autosft"), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(
                f"autosft {masked_command(sys.argv[1:])}\n{masked(text)}", encoding="utf-8"
            )
        except OSError:
            continue
        return str(folder / name)
    return "no file, because none could be written:\n" + text


def leave_without_flushing(code: int) -> NoReturn:
    """Exit after the reader of our output has gone, without Python's error message about it."""
    import os

    os._exit(code)


__all__ = ["DONE", "FAILED", "STOPPED", "WRONG_REQUEST", "app", "main"]
