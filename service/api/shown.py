"""Items, devices and trials as answers show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autosft.profiles.masking import masked, masked_command
from autosft.service.api import models
from autosft.service.board import Board, DeviceUse
from autosft.service.values import Item, ItemState
from autosft.studies.trial import TrialRecord


def shown_item(item: Item, board: Board, places: Mapping[int, int] | None = None) -> models.Shown:
    """Return an item with its place, the reason why it waits, and what is predicted of it."""
    places = board.places() if places is None else places
    reason = board.reasons.get(item.id) if item.is_queued else None
    predicted_start = reason.starts_at if reason is not None else None
    predicted_end = planned_end(item) if item.is_placed else reason.ends_at if reason is not None else None
    return models.Shown(
        id=item.id,
        name=item.name,
        command=item.arguments.command,
        command_line=masked_command(["autosft", *item.arguments.to_argv()]),
        owner=item.owner,
        state=item.state.value,
        place=places.get(item.id),
        priority=item.priority,
        reason=reason_of(item, board),
        note=masked(item.note),
        is_planning=item.demand is None and not item.is_ended,
        predicted=predicted_of(item),
        predicted_start=predicted_start,
        predicted_end=predicted_end,
        submitted_at=item.submitted_at,
        not_before=item.not_before,
        after=list(item.after),
        started_at=item.started_at,
        ended_at=item.ended_at,
        progress=item.progress,
        devices=[] if item.place is None else list(item.place.device_uuids),
        device_seconds=item.device_s,
        num_starts=item.num_starts,
        cloned_from=item.cloned_from,
    )


@dataclass(slots=True)
class ItemTexts:
    """Items as JSON, made once for all lists of one picture that they are in."""

    _made: tuple[Board, dict[int, tuple[Item, str]]] = field(default_factory=lambda: (Board(), {}))

    def of(self, board: Board, items: Sequence[Item]) -> list[str]:
        """Return the text of each item, with place and reason as in the picture."""
        made = self._made  # other threads may replace it
        if made[0] is not board:
            made = self._made = board, {}
        known, places = made[1], board.places()
        texts = []
        for item in items:
            its, text = known.get(item.id, (None, ""))
            if its is not item:
                text = shown_item(item, board, places).model_dump_json()
                known[item.id] = item, text
            texts.append(text)
        return texts


def planned_end(item: Item) -> float | None:
    """Return when a placed item ends: at its own pace, or before that is known as it was planned."""
    if item.ends_at is not None or item.state is ItemState.STOPPING:
        return item.ends_at
    if item.demand is None or item.place is None or item.started_at is None:
        return None
    return item.started_at + item.demand.ways[item.place.way].seconds * (1.0 - item.progress)


def reason_of(item: Item, board: Board) -> str:
    """Return why an item waits, "" for one that does not."""
    if not item.is_queued:
        return ""
    if item.demand is None:
        return "planning: what it needs is being predicted"
    known = board.reasons.get(item.id)
    return known.text if known is not None else "it is looked at next"


def predicted_of(item: Item) -> models.Predicted | None:
    """Return what an item needs at least; of one that runs, how it runs."""
    if item.demand is None:
        return None
    way = item.demand.narrowest if item.place is None else item.demand.ways[item.place.way]
    return models.Predicted(
        device_kind=way.kind,
        num_devices=way.width,
        bytes_each=way.bytes_each,
        seconds=way.seconds,
        seconds_low=way.seconds_low,
        seconds_high=way.seconds_high,
        is_predicted=item.demand.is_predicted,
    )


def shown_device(use: DeviceUse, names: dict[int, str]) -> models.ShownDevice:
    """Return a device; items that the reader may not see have no name."""

    def memory(parts: tuple[tuple[int, int], ...]) -> list[models.Memory]:
        return [
            models.Memory(item=item, name=names.get(item, "another user's"), num_bytes=num)
            for item, num in parts
        ]

    device = use.device
    return models.ShownDevice(
        uuid=device.uuid,
        name=device.name,
        node=device.node,
        index=device.index,
        total_bytes=device.total_bytes,
        predicted=memory(use.booked),
        measured=memory(use.measured),
        others_bytes=use.others_bytes,
        free_bytes=use.free_bytes,
        is_measured=use.is_measured,
    )


def shown_trial(trial: TrialRecord) -> models.ShownTrial:
    """Return a trial; a value that JSON does not know is none."""
    value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
    return models.ShownTrial(
        number=trial.number,
        state=trial.state.value,
        value=value,
        step=trial.best_step,
        num_attempts=trial.num_attempts,
        origin=trial.origin,
        settings=dict(trial.parameters),
        message=masked(trial.message),
    )
