"""`autosft chat`: models' answers side by side."""

from __future__ import annotations

import signal
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
from autosft.ui.terminal import new_console, share_bar, status_line, visible

if TYPE_CHECKING:
    from rich.console import Console

    from autosft.scheduler.finish.given_models import GivenModel
    from autosft.scheduler.finish.inference_client import InferenceClient, NamedModel
    from autosft.studies.report import Answer
    from autosft.studies.store.study_records import StudyRecords

app = application()

NARROW = 90  # in a narrower terminal answers are stacked


@app.command(
    "chat",
    cls=Command,
    help=teach(
        "Talk with models side by side in the terminal.",
        "autosft chat demo                                   the untuned and the best model",
        "autosft chat demo --prompt 'Drop the second of drill lion hat'",
        "autosft chat demo --compare base,best,3 --samples 5 answers to evaluation examples",
        "autosft chat my-model --compare base                what autosft train has written",
    ),
    epilog="Answers are decoded greedily, on a CPU in fp32, all models in the same precision.  In a "
    "conversation, Ctrl+C ends an answer, Ctrl+D the conversation, and /new starts over.",
)
def chat(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A study, a run's, checkpoint's, adapter's or model's folder, a best.yaml, or a hub id.",
            show_default=False,
        ),
    ],
    *,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODELS",
            help="base (what it was tuned from), best, a trial's number, a folder or a hub id.  Default for "
            "a study: base,best.",
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
    """Talk with models side by side in the terminal."""
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
    names = ", ".join(model.name for model in models)
    with InferenceClient(models, trust_remote_code=trust_remote_code, template_date=date) as answering:
        if data is not None and samples is not None:
            with share_bar(f"{names} answer {samples} prompts", is_quiet=quiet or as_json) as tell:
                shown = answering.samples(data, samples, max_new_tokens=max_new_tokens, on_share=tell)
            if as_json:
                write_json([sample_as_plain(sample) for sample in shown])
                return
            for sample in shown:
                show(console, sample.prompt, [*sample.answers, ("in the data", sample.expected)], quiet=quiet)
        elif prompt is not None:
            turn = [*before, {"role": "user", "content": prompt}]
            with status_line(f"{names} …", is_quiet=quiet or as_json):  # they may have to be loaded
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
    """Return the models and, of their study, prepared data if wanted and the template's date."""
    from autosft.commands.databases import known_studies
    from autosft.scheduler.finish.given_models import Kind, resolve_model
    from autosft.scheduler.finish.inference_client import NamedModel, models_of_study, prepared_folder
    from autosft.studies.files.study_folder import fetched_with_progress

    names = [name.strip() for name in (compare or "").split(",") if name.strip()]
    with known_studies(storage) as studies:
        named = next((study for study in studies if study.spec.name == what), None)
        if named is not None and not Path(what).expanduser().exists():
            if set(names) <= {"base"}:  # beside what was tuned
                names = ["base", "best"]
            models = models_of_study(named, names)
            data = prepared_folder(named.spec) if wants_data else None
            options = named.spec.data_options or {}
            return models, data, options.get("template_date")
        given = resolve_model(what, studies)
        study = given.study
        if wants_data and study is None:
            raise UserError(
                f"{what} belongs to no study here; --samples shows examples of a study.",
                remedy="Name the study.",
            )
        shown = f"trial {given.trial}" if given.kind is Kind.RUN and given.trial is not None else what
        own = NamedModel(name=shown, source=str(fetched_with_progress(given.source)))
        others = [other_model(name, given, studies) for name in names]
        bases = [model for model in others if model.name == "base"]
        models = (*bases, own, *(model for model in others if model not in bases))
        date = None if study is None else (study.spec.data_options or {}).get("template_date")
        return models, prepared_folder(study.spec) if wants_data and study else None, date


def other_model(name: str, given: GivenModel, studies: Sequence[StudyRecords]) -> NamedModel:
    """Return what `--compare` names beside a model that is no study.  Raises UserError."""
    from autosft.scheduler.finish.given_models import base_named_by, resolve_model
    from autosft.scheduler.finish.inference_client import NamedModel, models_of_study

    if name == "base":
        base = base_named_by(given)
        if base is None:
            raise UserError(
                f"--compare base: nothing here says what {given.given} was tuned from.",
                remedy="Name the model: --compare FOLDER_OR_HUB_ID.",
            )
        return NamedModel(name="base", source=base)
    if name == "best" or name.isdigit():
        if given.study is None:
            raise UserError(
                f"--compare {name}: {given.given} belongs to no study in the database.",
                remedy="Name the study, or compare with a folder: --compare FOLDER.",
            )
        return models_of_study(given.study, (name,))[0]
    return NamedModel(name=name, source=resolve_model(name, studies).source)


def converse(
    console: Console,
    answering: InferenceClient,
    models: Sequence[NamedModel],
    before: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
) -> None:
    """Chat until the end of input; every model keeps its own history."""
    console.print(
        "Ctrl+C ends an answer, Ctrl+D the conversation, /new starts over.", style="dim", highlight=False
    )
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
        for model, history in zip(models, histories, strict=True):
            history.append({"role": "user", "content": said})
            if len(models) > 1:
                console.print(visible(model.name), style="dim", highlight=False, markup=False)
            text = streamed(console, answering, model, history, max_new_tokens=max_new_tokens)
            history.append({"role": "assistant", "content": text})
        console.print()


def streamed(
    console: Console,
    answering: InferenceClient,
    model: NamedModel,
    history: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
) -> str:
    """Print an answer as it comes, and return it; Ctrl+C ends it where it is."""
    is_stopped = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal is_stopped
        if is_stopped:  # it does not end
            raise KeyboardInterrupt
        is_stopped = True
        answering.stop()

    waiting = console.status(f"{visible(model.name)} …")  # it may have to be loaded

    def tell(piece: str) -> None:
        waiting.stop()
        console.out(visible(piece), end="", highlight=False)

    before = signal.signal(signal.SIGINT, stop)
    try:
        waiting.start()
        text = answering.ask_one(model, history, max_new_tokens=max_new_tokens, on_text=tell)
    finally:
        waiting.stop()
        signal.signal(signal.SIGINT, before)
    remark = "(stopped)" if is_stopped else "" if text else "(nothing)"
    console.print(f" {remark}" if text and remark else remark, style="dim", highlight=False)
    return text


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
