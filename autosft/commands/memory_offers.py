"""If nothing fits: list the changes that would, and let the user choose one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from autosft.profiles.errors import UserError
from autosft.ui.terminal import new_console

if TYPE_CHECKING:
    from autosft.scheduler.plan.remedies import Remedy, TooLittleMemoryError
    from autosft.studies.request import TuneRequest

AnswerYes = Annotated[
    bool | None,
    typer.Option(
        "--yes/--no",
        help="If memory is too small: apply the first change that fits, or none; default: ask.",
    ),
]

T = TypeVar("T")


def with_offers(request: TuneRequest, answer: bool | None, work: Callable[[TuneRequest], T]) -> T:
    """Do the work; if memory is too small for the request, retry with the change that the user accepts.

    `answer` is the value of `--yes/--no`.  Without it the user is asked on a terminal; otherwise, and if no
    change is accepted, the error is raised.
    """
    try:
        return work(request)
    except UserError as error:
        from autosft.scheduler.plan.remedies import TooLittleMemoryError, taken

        offer = choose(error, answer) if isinstance(error, TooLittleMemoryError) else None
        if offer is None:
            raise
    typer.echo(f"Applied: {offer.change}", err=True)
    return work(taken(request, offer))


def choose(error: TooLittleMemoryError, answer: bool | None) -> Remedy | None:
    """Return the accepted offer, or None."""
    from rich.prompt import Prompt

    from autosft.scheduler.plan.remedies import offer_lines, takeable

    offers = takeable(error.offers)
    if not offers or answer is False:
        return None
    if answer is True:
        typer.echo(error.message, err=True)
        return offers[0]
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    typer.echo(error.message, err=True)
    for number, line in enumerate(offer_lines(offers), start=1):
        typer.echo(f"  {number}  {line}", err=True)
    numbers = [str(number) for number in range(len(offers) + 1)]
    chosen = Prompt.ask(
        f"Which one, 1 to {len(offers)}? y: the first, n or 0: none",
        choices=[*numbers, "y", "n", "yes", "no"],
        case_sensitive=False,
        default="n",
        console=new_console(stderr=True),
        show_default=False,
        show_choices=False,
    )
    word = {"y": 1, "yes": 1, "n": 0, "no": 0}.get(chosen.lower())
    taken = int(chosen) if word is None else word
    return offers[taken - 1] if taken else None
