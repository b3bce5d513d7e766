"""The only way to the terminal: text from data, names and models is displayed and never interpreted.

Control characters in a prompt, a file's name or a model's answer could clear the screen, write a link or
turn a line around (CWE-150).  `guarded_output` wraps stdout and stderr while a command runs and
escapes them, whoever prints; `new_console` is a rich console whose own colours and cursor
movements pass, and whose contents do not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from autosft.profiles.progress_bar import progress_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

#: C0 and C1 without line feed and tab, marks that reverse the reading order, and halves of surrogate pairs.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return text with escapes such as `\x1b` in the place of characters that act on a terminal."""
    return _ACTING.sub(_escape, text)


def json_visible(text: str) -> str:
    r"""Return JSON that means the same, with escapes such as `\u009b` in the place of these characters."""
    return _ACTING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class GuardedStream:
    """A text stream that writes visibly what would act on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        self.unguarded.write(visible(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Guard stdout and stderr as long as a command runs."""
    before = sys.stdout, sys.stderr
    for stream in before:
        # A terminal that cannot show a letter must not end a study: it gets an escape in its place.
        with suppress(AttributeError, ValueError, OSError):  # not a text file of its own, such as a test's
            unguarded(stream).reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    sys.stdout, sys.stderr = (cast("TextIO", GuardedStream(unguarded(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unguarded(stream: TextIO) -> TextIO:
    """Return the stream behind a guarded one, for code that writes escape sequences deliberately."""
    return stream.unguarded if isinstance(stream, GuardedStream) else stream


def new_console(*, stream: TextIO | None = None, stderr: bool = False, **options: Any) -> Console:
    """Return a rich console for stdout, stderr or `stream` that shows what it is given as it is.

    Neither markup in brackets nor `:names:` of emoji are replaced: the text may be anybody's.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class VisibleConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            # Before it is measured, and before rich drops some control characters without a trace.
            return super().render_str(visible(text), **options)

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control or not _ACTING.search(segment.text):
                    yield segment
                else:
                    yield Segment(visible(segment.text), segment.style)

    stream = stream or (sys.stderr if stderr else sys.stdout)
    defaults = {"highlight": False, "markup": False, "emoji": False}
    return VisibleConsole(file=unguarded(stream), **{**defaults, **options})


def status_line(text: str = "", *, is_quiet: bool) -> Status:
    """Return a status line on stderr for slow steps; silent if stderr is not a terminal."""
    return new_console(stderr=True, quiet=is_quiet or not sys.stderr.isatty()).status(text)


@contextmanager
def share_bar(what: str, *, is_quiet: bool) -> Iterator[Callable[[float], None]]:
    """Show on stderr which share of something is done and the time left, where a person looks on."""
    form = "{desc} {percentage:.0f} % |{bar}| {elapsed}, {remaining} left"
    with progress_bar(what, is_quiet=is_quiet, total=100.0, bar_format=form) as bar:
        yield lambda share: bar.update(100.0 * share - bar.n)
