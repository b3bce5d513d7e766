"""Items, devices and trials in words, as the page shows them.  Every figure says predicted or measured."""

from __future__ import annotations

import time
from typing import Any

from autosft.profiles.units import gib as sized
from autosft.service.api import models
from autosft.studies.formatting import format_duration, format_metric, format_settings
from autosft.studies.trial import TrialRecord

_OPEN = ("waiting", "preempted", "held", "starting", "running", "stopping")
_WORDS = {"preempted": "preempted, goes on later", "starting": "starting", "stopping": "stopping"}


def item_on_page(item: models.Shown, now: float) -> dict[str, Any]:
    """Return an item's words."""
    return {
        "id": item.id,
        "name": item.name,
        "command": item.command,
        "command_line": item.command_line,
        "owner": item.owner,
        "state": item.state,
        "state_text": "planning" if item.is_planning and item.place else _WORDS.get(item.state, item.state),
        "is_open": item.state in _OPEN,
        "place": item.place,
        "priority": item.priority,
        "reason": item.reason,
        "note": item.note,
        "percent": round(100 * item.progress),
        "submitted": clock(item.submitted_at, now),
        "needs": needs_of(item.predicted),
        "times": list(_times(item, now)),
        "facts": list(_facts(item, now)),
    }


def needs_of(predicted: models.Predicted | None) -> str:
    """Return what an item needs, in words."""
    if predicted is None:
        return ""
    said = "predicted" if predicted.is_predicted else "assumed"
    many = f"{predicted.num_devices} x " if predicted.num_devices > 1 else ""
    return f"{many}{gib(predicted.bytes_each)}, {format_duration(predicted.seconds)} ({said})"


def _times(item: models.Shown, now: float) -> list[tuple[str, str]]:
    found = []
    if item.state in ("running", "starting", "stopping"):
        if item.started_at is not None:
            found.append(("started", clock(item.started_at, now)))
        if item.predicted_end is not None:
            found.append(("predicted end", clock(item.predicted_end, now)))
        if item.progress:
            found.append(("done, measured", f"{100 * item.progress:.0f} %"))
    elif item.ended_at is not None:
        found.append(("ended", clock(item.ended_at, now)))
        if item.started_at is not None:
            found.append(("ran", format_duration(item.ended_at - item.started_at)))
    elif item.state != "held":
        start, end = item.predicted_start, item.predicted_end
        found.append(("predicted start", "not known yet" if start is None else clock(start, now)))
        if end is not None:
            found.append(("predicted end", clock(end, now)))
    return found


def _facts(item: models.Shown, now: float) -> list[tuple[str, str]]:
    found = [("owner", item.owner), ("submitted", clock(item.submitted_at, now)), *_times(item, now)]
    if needs := needs_of(item.predicted):
        found.append(("needs", needs))
    if item.predicted is not None:
        found.append(("device", item.predicted.device_kind.partition("/")[0]))
    if item.device_seconds:
        found.append(("device time, measured", format_duration(item.device_seconds)))
    if item.progress and item.state not in ("running", "starting", "stopping"):
        found.append(("done, measured", f"{100 * item.progress:.0f} %"))
    if item.num_starts > 1:
        found.append(("starts", str(item.num_starts)))
    if item.after:
        found.append(("after", ", ".join(map(str, item.after))))
    if item.not_before is not None:
        found.append(("not before", clock(item.not_before, now)))
    if item.cloned_from is not None:
        found.append(("cloned from", str(item.cloned_from)))
    return found


def device_on_page(device: models.ShownDevice) -> dict[str, Any]:
    """Return a device's two bars: what is booked by prediction, and what is measured."""
    total = max(1, device.total_bytes)

    def part(kind: str, name: str, num: int) -> dict[str, Any]:
        return {"kind": kind, "name": name, "size": gib(num), "percent": round(100 * num / total, 2)}

    booked = [part("ours", one.name, one.num_bytes) for one in device.predicted]
    held = [part("measured", one.name, one.num_bytes) for one in device.measured]
    others = [part("others", "other programs", device.others_bytes)] if device.others_bytes else []
    num_booked = sum(one.num_bytes for one in device.predicted)
    num_held = sum(one.num_bytes for one in device.measured)
    left = max(0, device.total_bytes - num_booked - device.others_bytes)
    bars = [
        {
            "label": "predicted",
            "parts": booked + others,
            "text": f"{gib(num_booked)} booked, {gib(left)} left",
        },
        {
            "label": "measured",
            "parts": held + others,
            "text": f"{gib(num_held)} ours, {gib(device.others_bytes)} others', "
            f"{gib(device.free_bytes)} free",
        },
    ]
    return {
        "name": device.name,
        "node": device.node,
        "index": device.index,
        "total": gib(device.total_bytes),
        "bars": bars if device.is_measured else bars[:1],
    }


def trial_on_page(trial: TrialRecord) -> dict[str, Any]:
    """Return a trial's words."""
    return {
        "number": trial.number,
        "state": trial.state.value,
        "value": format_metric(trial.value),
        "step": "" if trial.best_step is None else trial.best_step,
        "settings": format_settings(trial.parameters, {}),
        "message": trial.message,
    }


def gib(num_bytes: int) -> str:
    """Return a size in words, nothing as 0."""
    return sized(num_bytes) if num_bytes else "0"


def clock(at: float, now: float) -> str:
    """Return a time as people say it: the hour, with the day where it is not today."""
    then, today = time.localtime(at), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %H:%M" if abs(at - now) < 6 * 86_400 else "%Y-%m-%d %H:%M", then)
