"""The timeline: which trial used which device when."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from autosft.studies.formatting import format_duration
from autosft.studies.report.facts import StudyReport
from autosft.studies.report.plotting import MANY, Figure, layout_of
from autosft.studies.values import AttemptRecord

#: How attempts ended: outcome -> (legend, colour).
_OUTCOMES = {
    "completed": ("ran to the end", "@done"),
    "stopped": ("stopped early", "@stopped"),
    "interrupted": ("paused or interrupted", "@interrupted"),
    "failed": ("out of memory or failed", "@bad"),
    "running": ("running", "@second"),
}


def time_line(report: StudyReport) -> Figure | None:
    """Plot which trial used which device when."""
    if not report.attempts:
        return None
    lanes = _lanes(report.attempts, now=report.written_at)
    rows = sorted({row for row in lanes.values()})
    data = []
    for kind, (legend, color) in _OUTCOMES.items():
        shown = [attempt for attempt in report.attempts if _outcome(attempt) == kind]
        if not shown:
            continue
        ends = [attempt.ended_at or report.written_at for attempt in shown]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": legend,
                "base": [_local(attempt.started_at) for attempt in shown],
                "x": [
                    round(1000 * (end - attempt.started_at)) for attempt, end in zip(shown, ends, strict=True)
                ],
                "y": [lanes[attempt.trial, attempt.number] for attempt in shown],
                "text": [str(attempt.trial) for attempt in shown],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "constraintext": "inside",
                "customdata": [
                    f"trial {attempt.trial}"
                    + (f", attempt {attempt.number}" if attempt.number > 1 else "")
                    + f"<br>{format_duration(end - attempt.started_at)}"
                    + (f"<br>{attempt.outcome}" if attempt.outcome else "<br>running")
                    for attempt, end in zip(shown, ends, strict=True)
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {
                    "color": color,
                    "line": {"color": "@card", "width": 1 if len(report.attempts) < MANY else 0},
                },
            }
        )
    layout = layout_of(x=None, y=None)
    layout |= {"barmode": "overlay", "bargap": 0.25}
    layout["xaxis"] |= {"type": "date", "nticks": 4}
    layout["yaxis"] |= {"showgrid": False, "categoryorder": "array", "categoryarray": rows[::-1]}
    layout["uniformtext"] = {"mode": "hide", "minsize": 9}
    return Figure(
        name="time-line",
        caption="Numbers are trials. A device has as many lines as trials shared it.",
        height_px=150 + 34 * len(rows),
        data=data,
        layout=layout,
    )


def _lanes(attempts: Sequence[AttemptRecord], *, now: float) -> Mapping[tuple[int, int], str]:
    """Assign each attempt a lane of its device, a further one if another attempt occupies the lane."""
    free_at: dict[str, list[float]] = {}
    names: dict[tuple[int, int], tuple[str, int]] = {}
    for attempt in sorted(attempts, key=lambda attempt: (attempt.started_at, attempt.trial)):
        device = ", ".join(attempt.device_uuids) or attempt.device_name
        ends = free_at.setdefault(device, [])
        # An attempt that follows at once was placed when the end of the one before it was recorded.
        lane = next((i for i, end in enumerate(ends) if end <= attempt.started_at + 0.05), len(ends))
        ends[lane : lane + 1] = [attempt.ended_at or now]
        names[attempt.trial, attempt.number] = (device, lane)
    device_names = {
        ", ".join(attempt.device_uuids) or attempt.device_name: attempt.device_name for attempt in attempts
    }
    order = {device: i for i, device in enumerate(sorted(free_at))}
    return {
        key: device_names[device]
        + (f" #{order[device]}" if list(device_names.values()).count(device_names[device]) > 1 else "")
        + (f" · {lane + 1}" if len(free_at[device]) > 1 else "")
        for key, (device, lane) in names.items()
    }


def _outcome(attempt: AttemptRecord) -> str:
    match attempt.outcome:
        case None:
            return "running"
        case "completed" | "non-finite loss":
            return "completed"
        case "pruned" | "stopped by the user" | "time budget over":
            return "stopped"
        case "abandoned" | "shutdown" | "worker lost" | "paused at a rung" | "paused by the user":
            return "interrupted"
    return "failed"


def _local(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
