"""Flags shared by several commands, and the output they control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from autosft.ui.terminal import json_visible

STOPPED = 130  #: exit code: stopped by the user, all results kept

Study = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Write only the result.")]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Study database; default: a SQLite file in your data folder."),
]
Hardware = Annotated[
    str,
    typer.Option(
        metavar="HARDWARE",
        help="auto, cpu (2xcpu: as two devices), a known device, or a saved profile.",
    ),
]

# How data is read.
MaxRounds = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Keep at most N rounds of each conversation.")
]
BlockSize = Annotated[
    int | None, typer.Option(metavar="N", min=8, help="Pack plain text into blocks of N tokens.")
]
TemplateDate = Annotated[
    str | None,
    typer.Option(metavar="DATE", help="Date for chat templates that contain today's date: 2026-11-30."),
]
SkipBadRecords = Annotated[
    bool, typer.Option("--skip-bad-records", help="Skip and count bad records instead of stopping.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that ships with the model.")
]


class Command(TyperCommand):
    """A command whose help groups its flags under their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                heading = getattr(parameter, "rich_help_panel", None) or (
                    "Arguments" if is_argument else "Options"
                )
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def application() -> typer.Typer:
    """Return a typer application with autosft's conventions."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        no_args_is_help=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )


def teach(summary: str, *examples: str) -> str:
    """Return a command's help text: a summary, then examples, one per line."""
    return "\n".join((summary, "", "\b", *examples))


def write_json(value: Any) -> None:
    """Print plain values as JSON."""
    typer.echo(json_visible(json.dumps(value, indent=2, ensure_ascii=False)))


def folder_of(path: Path) -> Path:
    """Return the parent folder of an output file.  Raises UserError if it does not exist."""
    from autosft.profiles.errors import UserError

    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}.", remedy="Create it first.")
    return path.parent
