"""The live view: what it lays out, in any width, and what it leaves behind on the terminal."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from autosft.scheduler.events import Note, StudyEvent, TrialEnded, TrialStarted, Waiting
from autosft.studies.trial import TrialState
from autosft.ui.live_view import ASCII, UNICODE, LiveView, board, choose_rows, rows_when_wrapped
from autosft.ui.output import conclusion_facts
from autosft.ui.progress import Progress
from tests.cli.study_script import CONCLUSION, OPENED, record, study_events


def progress_of(events: list[StudyEvent]) -> Progress:
    progress = Progress()
    for now, event in enumerate(events):
        progress.apply(event, now=now * 0.1)
    return progress


def lines_of(progress: Progress, *, width: int = 80, height: int = 24, glyphs=UNICODE) -> list[str]:
    return [
        line.plain for line in board(progress, width=width, height=height, now=60.0, since=0.0, glyphs=glyphs)
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 220])
@pytest.mark.parametrize("height", [10, 24, 40])
@pytest.mark.parametrize("num_trials", [1, 12, 60])
def test_the_board_fits_the_terminal_at_every_moment(width, height, num_trials):
    events = list(study_events(num_trials))
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        lines = lines_of(progress_of(events[: int(share * len(events))]), width=width, height=height)
        assert len(lines) < height
        assert [line for line in lines if cell_len(line) > width] == []


def test_a_row_tells_settings_step_loss_speed_memory_and_state():
    events = list(study_events())
    lines = lines_of(progress_of(events[: len(events) // 3]))
    header, *rows = lines
    assert header.split() == ["#", "settings", "step", "loss", "eval", "tok/s", "mem/most", "state"]
    assert rows[0].split()[:3] == ["0", "default", "lr"]
    running = [row for row in rows if row.endswith("running")]
    assert running
    assert all("M" in row and "/150" in row for row in running)


def test_wide_terminals_name_the_device_and_the_metric():
    header = lines_of(progress_of(list(study_events())), width=140)[0]
    assert header.split()[-2:] == ["on", "state"]
    assert "eval_loss" in header


def test_the_best_trial_is_marked_and_named():
    progress = progress_of(list(study_events()))
    lines = lines_of(progress)
    [marked] = [line for line in lines if line.startswith("★")]
    assert marked.split()[1] == str(progress.best.trial)
    assert any(line.startswith(f"best so far trial {progress.best.trial}, eval_loss") for line in lines)


def test_the_untuned_model_stands_beside_the_best():
    events = list(study_events())
    before = lines_of(progress_of(events[:6]))
    assert "untuned     eval_loss 2.5131" in before
    after = lines_of(progress_of(events))
    at = next(i for i, line in enumerate(after) if line.startswith("best so far"))
    assert after[at - 1] == "untuned     eval_loss 2.5131"
    assert after[at + 1].strip() == "better than untuned: loss lower by 2.01 ± 0.11 nats per token"


def test_running_and_best_trials_stay_when_there_is_no_room_for_all():
    events = list(study_events(60))
    progress = progress_of(events[: int(0.8 * len(events))])
    shown = choose_rows(progress, at_most=6)
    numbers = [row.number for row in shown]
    assert numbers == sorted(numbers)
    assert {row.number for row in progress.running} | {progress.best.trial} <= set(numbers)
    text = "\n".join(lines_of(progress, height=14))
    assert "more: " in text
    assert "completed" in text


def test_more_running_trials_than_rows():
    progress = progress_of(
        [OPENED, *(TrialStarted(record=record(n), attempt=1, device_names=("GPU",)) for n in range(50))]
    )
    assert len(lines_of(progress, height=24)) < 24
    assert "more: " in "\n".join(lines_of(progress, height=24))


def test_waiting_is_said_until_a_trial_starts():
    held = Waiting(message="GPU 0 is held by pid 7")
    assert "waiting: GPU 0 is held by pid 7" in lines_of(progress_of([OPENED, held]))
    started = TrialStarted(record=record(0), attempt=1, device_names=("GPU 0",))
    assert not any("waiting" in line for line in lines_of(progress_of([OPENED, held, started])))


def test_without_unicode_the_board_is_ascii():
    events = list(study_events(60))
    text = "\n".join(lines_of(progress_of(events[: len(events) // 2]), glyphs=ASCII))
    assert text.isascii()


def show(events: list[StudyEvent], **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=24, **options)
    view = LiveView(console, clock=lambda: 0.0)
    for event in events:
        view(event)
    view.conclude(CONCLUSION, heading="study demo", facts=conclusion_facts(CONCLUSION))
    view.close()
    return stream.getvalue()


def test_plan_notes_and_summary_stay_on_the_terminal():
    text = show(list(study_events(2)), no_color=True, color_system=None, legacy_windows=False)
    assert (
        text.index("No --model and --data")
        < text.index("Fits: micro batch 16")
        < text.index("2 of 2 finished")
    )
    assert f"  train again  autosft train {CONCLUSION.best_yaml}\n" in text  # not wrapped
    assert "11 % of 200 held-out instructions" in text


def test_failures_are_told_once_above_the_board():
    failed = record(0, TrialState.FAILED, message="trial 0 broke: [bold]KeyError[/bold]")
    text = show([OPENED, TrialEnded(record=failed)], color_system=None)
    assert text.count("trial 0 broke: [bold]KeyError[/bold]") == 1  # as it is: no markup of rich's


def test_no_colour_when_the_user_wants_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in show(list(study_events(2)), color_system="truecolor")
    monkeypatch.delenv("NO_COLOR")
    assert "32m" in show(list(study_events(2)), color_system="truecolor")


def test_closing_gives_the_cursor_back_and_ends_the_thread():
    before = threading.active_count()
    text = show([Note(message="hello")])
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert threading.active_count() == before


def test_a_narrower_terminal_loses_the_whole_board_and_no_line_above_it():
    """What was drawn 100 wide takes more rows in 60 columns: as many are erased."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=24, color_system=None)
    view = LiveView(console, clock=lambda: 0.0)
    for event in list(study_events())[:-3]:
        view(event)
    view._live.refresh()
    width, lines = view._drawn
    assert (width, max(line.cell_len for line in lines) > 60) == (100, True)
    stream.truncate(0)
    console.width = 60
    view.close()
    written = stream.getvalue()
    first = written[: written.index("\n")]
    assert first.count("\x1b[1A") == rows_when_wrapped(lines, 60) - 1 > len(lines) - 1
    assert rows_when_wrapped(lines, 100) == len(lines)


def test_names_of_other_metrics_head_their_column():
    opened = replace(OPENED, metric="eval_token_accuracy", minimize=False)
    started = TrialStarted(record=record(0), attempt=1, device_names=("GPU",))
    assert "token_accu" in lines_of(progress_of([opened, started]))[0]


def test_a_stopped_study_expects_nothing_any_more():
    events = list(study_events())
    progress = progress_of(events[: len(events) // 2])
    before = [line.plain for line in board(progress, width=80, height=24, now=9.0, since=0.0)]
    after = [line.plain for line in board(progress, width=80, height=24, now=9.0, since=0.0, is_over=True)]
    assert "left" in before[-1]
    assert "Ctrl+C" in before[-1]
    assert "left" not in after[-1]
    assert "Ctrl+C" not in after[-1]
    assert board(Progress(), width=80, height=24, now=9.0, since=0.0, is_over=True) == []
