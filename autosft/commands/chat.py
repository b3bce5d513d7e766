"""`autosft chat`: models' answers side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands.options import (
    AsJson,
    Command,
    Quiet,
    Storage,
    TemplateDate,
    TrustRemoteCode,
    application,
    teach,
    write_json,
)
from autosft.profiles.errors import UserError
from autosft.ui.terminal import new_console, visible

if TYPE_CHECKING:
    from rich.console import Console

    from autosft.scheduler.finish.inference_client import InferenceClient, NamedModel
    from autosft.studies.report import Answer

app = application()

NARROW = 90  # in a narrower terminal answers are stacked


@app.command(
    "chat",
    cls=Command,
    help=teach(
        "Compare models' answers side by side in the terminal.",
        "autosft chat demo                                   the untuned and the best model",
        "autosft chat demo --prompt 'Drop the second of drill lion hat'",
        "autosft chat demo --compare base,best,3 --samples 5 answers to evaluation examples",
        "autosft chat ./my-model",
    ),
    epilog="Answers are decoded greedily.  In a conversation, /new starts over.",
)
def chat(
    what: Annotated[
        str, typer.Argument(metavar="STUDY|FOLDER", help="A study or a model folder.", show_default=False)
    ],
    *,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODELS",
            help="base, best, a trial's number, a folder or a hub id.  Default for a study: base,best.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this prompt and exit.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show answers to N evaluation examples of the study."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum length of an answer.")
    ] = 256,
    template_date: TemplateDate = None,
    trust_remote_code: TrustRemoteCode = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare models' answers side by side in the terminal."""
    from autosft.profiles.dataset.template_date import parse_date
    from autosft.scheduler.finish.inference_client import InferenceClient

    if as_json and prompt is None and samples is None:
        raise UserError("--json needs --prompt or --samples.", remedy="A conversation is interactive.")
    if template_date is not None:
        template_date = parse_date(template_date)
    models, data, date = resolve(what, compare, storage, wants_data=samples is not None)
    console = new_console()
    before = [{"role": "system", "content": system}] if system else []
    date = template_date or date
    with InferenceClient(models, trust_remote_code=trust_remote_code, template_date=date) as answering:
        if data is not None and samples is not None:
            shown = answering.samples(data, samples, max_new_tokens=max_new_tokens)
            if as_json:
                write_json([sample_as_plain(sample) for sample in shown])
                return
            for sample in shown:
                show(console, sample.prompt, [*sample.answers, ("in the data", sample.expected)], quiet=quiet)
        elif prompt is not None:
            turn = [*before, {"role": "user", "content": prompt}]
            texts = [texts[0] for texts in answering.ask([turn], max_new_tokens=max_new_tokens)]
            answers = [(model.name, text) for model, text in zip(models, texts, strict=True)]
            if as_json:
                write_json({"prompt": prompt, "answers": dict(answers)})
            else:
                show(console, None, answers, quiet=quiet)
        else:
            converse(console, answering, models, before, max_new_tokens=max_new_tokens)


def resolve(
    what: str, compare: str | None, storage: str | None, *, wants_data: bool
) -> tuple[tuple[NamedModel, ...], Path | None, str | None]:
    """Return the models and, of their study, prepared data if wanted and the template's date.

    An existing folder or GGUF file is a model, anything else the name of a study.
    """
    from autosft.profiles.model.gguf import is_gguf
    from autosft.scheduler.finish.inference_client import NamedModel, models_of_study, prepared_folder

    names = [name.strip() for name in (compare or "").split(",") if name.strip()]
    folder = Path(what).expanduser()
    if folder.is_dir() or is_gguf(str(folder)):
        if wants_data or {"base", "best"} & set(names):
            raise UserError(
                f"{what} is a model folder; --samples, base and best need a study.",
                remedy="Name the study, or compare with another folder: --compare FOLDER.",
            )
        return tuple(NamedModel(name=name, source=name) for name in (str(folder), *names)), None, None

    from autosft.commands.databases import reading

    with reading(storage) as records:
        study = records.read_study(what)
        models = models_of_study(study, names or ("base", "best"))
        data = prepared_folder(study.spec) if wants_data else None
        options = study.spec.data_options or {}
        return models, data, options.get("template_date")


def converse(
    console: Console,
    answering: InferenceClient,
    models: Sequence[NamedModel],
    before: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
) -> None:
    """Chat until the end of input; every model keeps its own history."""
    console.print("Ctrl+D ends the conversation, /new starts over.", style="dim")
    histories = [list(before) for _ in models]
    while True:
        try:
            said = console.input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if said.strip() == "/new":
            histories = [list(before) for _ in models]
            continue
        if not said.strip():
            continue
        answers = []
        for model, history in zip(models, histories, strict=True):
            history.append({"role": "user", "content": said})
            with console.status(f"{model.name} …"):
                text = answering.ask_one(model, history, max_new_tokens=max_new_tokens)
            history.append({"role": "assistant", "content": text})
            answers.append((model.name, text))
        show(console, None, answers, quiet=False)


def show(console: Console, prompt: str | None, answers: Sequence[tuple[str, str]], *, quiet: bool) -> None:
    """Print answers side by side, or stacked if the terminal is narrow or there is only one."""
    from rich.table import Table
    from rich.text import Text

    answers = [(visible(name), visible(text)) for name, text in answers]
    if prompt is not None:
        console.print(Text(visible(prompt), style="bold"))
    if quiet:
        for _, text in answers:
            console.print(text, soft_wrap=True)
    elif len(answers) == 1:
        console.print(answers[0][1] or "(nothing)")
    elif console.width < NARROW:
        for name, text in answers:
            console.print(Text(name, style="dim"))
            console.print(text or "(nothing)")
    else:
        table = Table(box=None, pad_edge=False, expand=True, padding=(0, 4, 0, 0), header_style="dim")
        for name, _ in answers:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(text or "(nothing)" for _, text in answers))
        console.print(table)
    console.print()


def sample_as_plain(sample: Answer) -> dict[str, object]:
    return {"prompt": sample.prompt, "expected": sample.expected, "answers": dict(sample.answers)}
