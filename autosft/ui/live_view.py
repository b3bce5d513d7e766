"""The live view of a study on a terminal.

Permanent lines (plan, notes, conclusion) are printed once; the board below them is redrawn: a row per trial,
the best so far, and the time left.  It is drawn at most four times a second and only if something has
changed (otherwise once a second, for the clock), because the cores are busy training.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autosft.scheduler.events import AdviceGiven, Note, StudyEvent, StudyOpened, TrialEnded
from autosft.studies.formatting import format_count, format_duration, format_metric, format_settings
from autosft.studies.search.dimensions import Value
from autosft.studies.trial import TrialState
from autosft.ui.output import COMMAND_LABELS, Fact, title
from autosft.ui.progress import (
    Progress,
    TrialRow,
    about,
    against_untuned,
    describe_forecast,
    memory_text,
    predicted_end,
    time_left_s,
    waiting_text,
)

REFRESH_S = 0.25
CLOCK_S = 1.0  # redraw interval while nothing happens
WIDE = 120  # terminal width from which a longer bar and the device fit

#: Colours never carry information that the text lacks.
STYLES = {
    TrialState.WAITING: "dim",
    TrialState.RUNNING: "cyan",
    TrialState.PAUSED: "yellow",
    TrialState.COMPLETED: "green",
    TrialState.STOPPED: "dim",
    TrialState.INFEASIBLE: "magenta",
    TrialState.FAILED: "bold red",
}
BEST = "bold green"


class LiveView:
    """Shows a study on a terminal; see `autosft.ui.output.Output`."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._started_at = clock()
        self._progress = Progress()
        self._lock = threading.Lock()  # held while events change the progress and while it is laid out
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._is_abandoned = False
        self._drawn: tuple[int, list[Text]] = (0, [])  # width of the terminal then, and the board's lines
        self._live = Live(get_renderable=self._lay_out, console=console, auto_refresh=False)
        self._live.start(refresh=True)
        self._thread = threading.Thread(target=self._redraw, name="autosft-view", daemon=True)
        self._thread.start()

    def __call__(self, event: StudyEvent) -> None:
        with self._lock:
            self._progress.apply(event, now=self._clock())
        for line in lasting_lines(event):
            self._mind_resize()
            self._console.print(line)
        self._changed.set()

    def conclude(self, result: object, *, heading: str, facts: Sequence[Fact]) -> None:
        self.close()
        self._console.print()
        self._console.print(summary_panel(heading, [fact for fact in facts if fact[0] not in COMMAND_LABELS]))
        for label, text in facts:
            if label in COMMAND_LABELS:  # unframed and unwrapped, for copying
                self._console.print(Text.assemble((f"  {label:<13}", "dim"), text), soft_wrap=True)

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self._mind_resize()
            self._live.stop()

    def abandon(self) -> None:
        self._is_abandoned = True
        show_cursor = b"\x1b[?25h\n"
        with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
            os.write(self._console.file.fileno(), show_cursor)

    def _lay_out(self) -> RenderableType:
        width, height = self._console.size
        with self._lock:
            lines = board(
                self._progress,
                width=width,
                height=height,
                now=self._clock(),
                since=self._started_at,
                glyphs=ASCII if self._console.options.ascii_only else UNICODE,
                is_over=self._closed.is_set(),
            )
        self._drawn = width, lines
        return Group(*lines)

    def _mind_resize(self) -> None:
        """Have all rows erased that the board takes in a terminal that has become narrower since.

        Terminals wrap what is on the screen anew; rich would erase as many rows as it has written.
        """
        width, lines = self._drawn
        if self._console.width < width:
            shape = self._console.width, rows_when_wrapped(lines, self._console.width)
            self._live._live_render._shape = shape  # rich has no other way to say so

    def _redraw(self) -> None:
        num_quiet = 0
        while not (self._closed.wait(REFRESH_S) or self._is_abandoned):
            num_quiet += 1
            if self._changed.is_set() or num_quiet * REFRESH_S >= CLOCK_S:
                self._changed.clear()
                num_quiet = 0
                self._mind_resize()
                self._live.refresh()


def rows_when_wrapped(lines: Sequence[Text], width: int) -> int:
    """Return the rows that lines take in a terminal of this width."""
    return sum(max(1, math.ceil(line.cell_len / width)) for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The symbols on the board."""

    best: str
    done: str
    to_do: str
    dot: str
    more: str
    plus_minus: str


UNICODE = Glyphs(best="★", done="━", to_do="─", dot="·", more="…", plus_minus="±")
ASCII = Glyphs(best="*", done="=", to_do="-", dot="|", more="...", plus_minus="+-")


def lasting_lines(event: StudyEvent) -> Iterator[RenderableType]:
    """Yield the permanent lines of an event."""
    match event:
        case StudyOpened():
            yield Text(title(event), style="bold")
            yield from (Padding(Text(line), (0, 0, 0, 2)) for line in event.plan_lines)
            yield Text()
        case Note(message=message):
            yield Text(message, style="dim")
        case AdviceGiven(trial=trial, message=message):
            yield Text(f"advice, trial {trial}: {message}", style="yellow")
        case TrialEnded(record=record) if record.message and record.state is not TrialState.COMPLETED:
            yield Text(f"trial {record.number} {record.state.value}: {record.message}", style="yellow")


def board(
    progress: Progress,
    *,
    width: int,
    height: int,
    now: float,
    since: float,
    glyphs: Glyphs = UNICODE,
    is_over: bool = False,
) -> list[Text]:
    """Lay out the board in at most `width` columns and fewer than `height` lines.

    Once it `is_over`, the status line that stays no longer mentions what is to come.
    """
    if progress.opened is None:
        return (
            [] if is_over else [Text(f"preparing{glyphs.more} {format_duration(now - since)}", style="dim")]
        )
    foot = [
        Text(),
        *best_lines(progress, glyphs),
        *decision_lines(progress, is_over=is_over),
        *status_lines(progress, now=now, since=since, width=width, glyphs=glyphs, is_over=is_over),
    ]
    num_room = height - len(foot) - 3  # header, the line for the rest, and a spare one
    shown = choose_rows(progress, at_most=max(1, num_room))
    rest = [row for row in progress.rows.values() if row not in shown]
    lines = table(progress, shown, width=width, glyphs=glyphs) if shown else []
    if rest:
        lines.append(rest_line(rest, glyphs))
    return [fit(line, width, glyphs) for line in (*lines, *foot)]


def choose_rows(progress: Progress, *, at_most: int) -> list[TrialRow]:
    """Choose the trials to show, ordered by number: running ones, the best, then the latest."""
    best = progress.best.trial if progress.best else None
    by_interest = sorted(
        progress.rows.values(), key=lambda row: (not row.is_running, row.number != best, -row.number)
    )
    return sorted(by_interest[:at_most], key=lambda row: row.number)


def table(progress: Progress, rows: list[TrialRow], *, width: int, glyphs: Glyphs) -> list[Text]:
    """Lay out a header and a line per trial; the settings take the remaining columns.

    Done by hand because rich's Table takes ten times as long to draw, 5 % of a core.
    """
    assert progress.opened is not None
    is_wide = width >= WIDE
    has_ends = is_wide and any(row.forecast is not None for row in progress.rows.values())
    metric = progress.opened.metric
    columns = [
        Column(header="", least=1),
        Column(header="#", least=2, is_right=True),
        Column(header="settings", least=8, is_flexible=True),
        Column(header="", least=16 if is_wide else 6),
        Column(header="step", least=7, is_right=True),
        Column(header="loss", least=6, is_right=True),
        Column(header=metric if is_wide else metric.removeprefix("eval_")[:10], least=6, is_right=True),
        *([Column(header="end", least=6, is_right=True)] if has_ends else []),
        Column(header="tok/s", least=5, is_right=True),
        Column(header="mem/most", least=8, is_right=True),
        *([Column(header="on", least=4)] if is_wide else []),
        Column(header="state", least=10),
    ]
    if not is_wide and columns[6].header == "loss":  # next to the training loss
        columns[6] = Column(header="eval", least=6, is_right=True)
    bar_width = columns[3].least
    defaults = progress.defaults()
    cells = [
        row_cells(row, progress, defaults, bar_width, glyphs, is_wide=is_wide, has_ends=has_ends)
        for row in rows
    ]
    widths = [
        max(column.least, len(column.header), *(len(row[at][0]) for row in cells))
        for at, column in enumerate(columns)
    ]
    flexible = next(at for at, column in enumerate(columns) if column.is_flexible)
    others = sum(widths) - widths[flexible] + len(columns) - 1
    widths[flexible] = max(columns[flexible].least, min(widths[flexible], width - others))
    header = [(column.header, "dim") for column in columns]
    return [table_line(columns, widths, row, glyphs) for row in (header, *cells)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table, in terminal columns."""

    header: str
    least: int
    is_right: bool = False
    is_flexible: bool = False


def row_cells(
    row: TrialRow,
    progress: Progress,
    defaults: Mapping[str, Value],
    bar_width: int,
    glyphs: Glyphs,
    *,
    is_wide: bool,
    has_ends: bool,
) -> list[tuple[str, str]]:
    """Return (text, style) for every column of a trial."""
    is_best = progress.best is not None and progress.best.trial == row.number
    style = STYLES[row.state]
    quiet = style if style == "dim" else ""
    settings = format_settings(row.record.parameters, defaults)
    if row.record.is_default:
        settings = f"default {settings}"
    latest = row.latest
    bound_bytes = row.record.plan.booked_bytes if row.record.plan else None
    num_done = round(row.share_done * bar_width)
    return [
        (glyphs.best if is_best else "", BEST),
        (str(row.number), BEST if is_best else quiet),
        (settings, quiet),
        (glyphs.done * num_done + glyphs.to_do * (bar_width - num_done), style),
        (f"{latest.step}/{latest.num_steps}" if latest else "", quiet),
        (format_metric(latest.loss) if latest else "", quiet),
        (format_metric(row.value), BEST if is_best else quiet),
        *([(predicted_end(row.forecast, glyphs.plus_minus), quiet)] if has_ends else []),
        (format_count(latest.tokens_per_s) if latest else "", quiet),
        (memory_text(row.peak_bytes, bound_bytes), quiet),
        *([(", ".join(row.device_names), quiet)] if is_wide else []),
        (row.state.value, style),
    ]


def table_line(
    columns: Sequence[Column], widths: Sequence[int], cells: Sequence[tuple[str, str]], glyphs: Glyphs
) -> Text:
    """Join the cells of a line, padded to their widths, with single spaces."""
    line = Text()
    for column, width, (text, style) in zip(columns, widths, cells, strict=True):
        fitted = text if len(text) <= width else text[: width - len(glyphs.more)] + glyphs.more
        line.append(fitted.rjust(width) if column.is_right else fitted.ljust(width), style=style)
        line.append(" ")
    line.rstrip()
    return line


def rest_line(rest: Sequence[TrialRow], glyphs: Glyphs) -> Text:
    """Count the trials that do not fit on the board, by state."""
    counts = Counter(row.state.value for row in rest)
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    return Text(f"  {glyphs.more} and {len(rest)} more: {text}", style="dim")


def best_lines(progress: Progress, glyphs: Glyphs = UNICODE) -> list[Text]:
    """Describe the untuned model, the best trial so far beside it, and its settings."""
    if progress.opened is None:
        return []
    metric = progress.opened.metric
    untuned = (
        []
        if progress.untuned is None
        else [Text.assemble(("untuned     ", "dim"), f"{metric} {format_metric(progress.untuned)}")]
    )
    if progress.best is None:
        return untuned
    best, row = progress.best, progress.rows.get(progress.best.trial)
    line = Text.assemble(
        ("best so far ", "dim"),
        (f"trial {best.trial}, {metric} {format_metric(best.value)}", BEST),
        f" at step {best.step}",
    )
    if row is not None:
        line.append(f"  {format_settings(row.record.parameters, {})}", style="dim")
    against = against_untuned(best).replace("±", glyphs.plus_minus)
    compared = [Text.assemble(("            ", "dim"), against)] if against else []
    return [*untuned, line, *compared]


def decision_lines(progress: Progress, *, is_over: bool) -> list[Text]:
    """Say what the search decided last, and why."""
    if progress.opened is None or progress.forecast is None or is_over:
        return []
    text = describe_forecast(progress.forecast, progress.opened.metric)
    return [Text(f"decision    trial {progress.forecast.trial} {text}", style="dim")]


def status_lines(
    progress: Progress, *, now: float, since: float, width: int, glyphs: Glyphs, is_over: bool
) -> list[Text]:
    """Describe the study's progress, the time left, and what it waits for."""
    is_over = is_over or progress.num_finished >= progress.num_trials
    parts = [
        f"{progress.num_finished} of {progress.num_trials} finished",
        f"{len(progress.running)} running" if progress.running else "",
        format_duration(now - since),
        "" if is_over else about(time_left_s(progress, now=now)),
    ]
    separator = f" {glyphs.dot} "
    status = Text(separator.join(part for part in parts if part))
    for hint in ("Ctrl+C stops and keeps everything", "Ctrl+C stops"):
        if not is_over and status.cell_len + len(separator + hint) <= width:
            status.append(separator + hint, style="dim")
            break
    waiting = (
        [Text(waiting_text(progress.waiting), style="yellow")] if progress.waiting and not is_over else []
    )
    return [*waiting, status]


def fit(line: Text, width: int, glyphs: Glyphs) -> Text:
    """Truncate a line that is too long: a wrapped line would displace the board."""
    if line.cell_len > width:
        line.truncate(width - len(glyphs.more))
        line.append(glyphs.more)
    line.no_wrap = True
    return line


def summary_panel(heading: str, facts: Sequence[Fact]) -> Panel:
    """Return the result of a study in a panel."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(label, Text(text, style=BEST if label in ("best", "result") else ""))
    return Panel(grid, title=heading, title_align="left", border_style="green", expand=False)
