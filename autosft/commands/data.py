"""`autosft data`: what training data contains and what a model learns from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosft.commands.options import (
    AsJson,
    BlockSize,
    Command,
    MaxRounds,
    Quiet,
    SkipBadRecords,
    TemplateDate,
    TrustRemoteCode,
    application,
    teach,
    write_json,
)
from autosft.profiles.own_folders import cache_folder
from autosft.ui.terminal import new_console, visible

app = application()


@app.callback()
def data() -> None:
    """Inspect training data: counts, lengths, and which tokens a model learns."""


@app.command(
    "show",
    cls=Command,
    help=teach(
        "Show format, counts, lengths, truncation, and examples with learned tokens highlighted.",
        "autosft data show chats.jsonl --model ./llama --seq-len 1024",
    ),
    epilog="Only highlighted tokens count in the loss; the others are context.",
)
def show(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="File, folder or hub id.", show_default=False)
    ],
    *,
    model: Annotated[
        str, typer.Option(metavar="PATH_OR_HUB_ID", help="Model whose tokenizer is used.", show_default=False)
    ],
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Show what truncating to N tokens cuts off.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Examples to show.")] = 2,
    max_rounds: MaxRounds = None,
    block_size: BlockSize = None,
    template_date: TemplateDate = None,
    skip_bad_records: SkipBadRecords = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show format, counts, lengths, truncation, and examples with learned tokens highlighted."""
    from autosft.profiles.dataset import describe, prepare, sample_with_mask, truncation_report
    from autosft.profiles.dataset.prepared import manifest_of
    from autosft.profiles.dataset.tokenizer import num_embeddings_of
    from autosft.studies.wire import to_plain

    prepared = prepare(
        source,
        model=model,
        cache_dir=cache_folder() / "data",
        max_rounds=max_rounds,
        block_size=block_size,
        num_embeddings=num_embeddings_of(Path(model).expanduser()),
        template_date=template_date,
        skip_bad_records=skip_bad_records,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        truncation = truncation_report(prepared, [seq_len]) if seq_len else ()
        write_json({**to_plain(manifest_of(prepared)), "truncation": to_plain(truncation)})
        return
    console = new_console()
    for line in describe(prepared, [seq_len] if seq_len else ()):
        console.print(line, soft_wrap=True)
    if not quiet:
        for number, spans in enumerate(sample_with_mask(prepared, samples), start=1):
            console.print()
            console.rule(f"example {number}", align="left", style="dim")
            console.print(sample_text(spans, has_colour=console.color_system is not None), soft_wrap=True)


def sample_text(spans: tuple[tuple[str, bool], ...], *, has_colour: bool) -> object:
    """Return an example with learned parts on green, or between markers without colour."""
    from rich.text import Text

    text = Text()
    for span, is_scored in spans:
        part = visible(span)
        if is_scored and not has_colour:
            text.append(f"[learned]{part}[/learned]")
        else:
            text.append(part, style="black on green" if is_scored else "dim")
    return text
