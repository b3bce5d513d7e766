"""Chooses how a study is shown: live view, plain lines or JSON lines."""

from __future__ import annotations

import sys
from typing import TextIO

from autosft.ui.output import JsonLines, Output, PlainLines
from autosft.ui.terminal import new_console


def choose_output(
    *, as_json: bool, quiet: bool, stream: TextIO | None = None, is_live: bool = True
) -> Output:
    """Return JSON lines if requested, the live view on a terminal, plain lines otherwise.

    Quiet outputs show only the conclusion.  What is not live has nothing to redraw: it gets plain lines.
    """
    stream = stream or sys.stdout
    if as_json:
        return JsonLines(stream, quiet=quiet)
    if quiet or not is_live or not stream.isatty():
        return PlainLines(stream, quiet=quiet)

    from autosft.ui.live_view import LiveView

    console = new_console(stream=stream, highlight=True)
    return PlainLines(stream) if console.is_dumb_terminal else LiveView(console)
