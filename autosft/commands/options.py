"""Flags that several commands share, in one spelling, and writing what they ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from autosft.ui.terminal import json_visible

STOPPED = 130  #: exit code: stopped by the user, with everything kept

Study = Annotated[str, typer.Argument(metavar="STUDY", help="Its name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Write the result only.")]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Study database; the SQLite file in your data folder if not given."),
]
Hardware = Annotated[
    str,
    typer.Option(
        metavar="WHAT", help="auto, cpu (2xcpu: as two devices), a known device's name, or a saved profile."
    ),
]

# How data is read.
MaxRounds = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Keep at most so many rounds of a conversation.")
]
BlockSize = Annotated[
    int | None, typer.Option(metavar="N", min=8, help="Plain text is packed into blocks of this length.")
]
TemplateDate = Annotated[
    str | None,
    typer.Option(metavar="DATE", help="What a chat template that writes today's date writes: 2026-11-30."),
]
SkipBadRecords = Annotated[
    bool, typer.Option("--skip-bad-records", help="Leave bad records out, counted, instead of stopping.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
]


class Command(TyperCommand):
    """A command whose help lists its flags under the headings that they name."""

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
    """Return an empty application in the style of ours."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        no_args_is_help=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )


def teach(summary: str, *examples: str) -> str:
    """Return a command's help: what it does, and examples that are shown line by line."""
    return "\n".join((summary, "", "\b", *examples))


def write_json(value: Any) -> None:
    """Write plain values as JSON to stdout."""
    typer.echo(json_visible(json.dumps(value, indent=2, ensure_ascii=False)))


def folder_of(path: Path) -> Path:
    """Return the folder in which a file is to be written.  Raises UserError where there is none."""
    from autosft.profiles.errors import UserError

    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}.", remedy="Make it first.")
    return path.parent
