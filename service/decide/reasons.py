"""Why each item waits: one true sentence with figures, and when it is predicted to start.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from autosft.profiles.units import gib
from autosft.service.decide.expected import is_expected
from autosft.service.decide.forecast import Forecast, Planned
from autosft.service.decide.shares import Block
from autosft.service.decide.situation import HOUR_S, Situation, shares, way_of
from autosft.service.values import Device, Item, ItemState, Reason, Way


def reasons(situation: Situation, forecast: Forecast) -> tuple[tuple[int, Reason], ...]:
    """Return why each queued item waits: those that are considered in their order, then the others."""
    items = {item.id: item for item in situation.items}
    queued = [item.id for item in situation.items if item.is_queued]
    ordered = [*forecast.order, *(item_id for item_id in queued if item_id not in {*forecast.order})]
    places = {item_id: place for place, item_id in enumerate(forecast.order, 1)}
    told = _Told(situation=situation, forecast=forecast, items=items, places=places)
    return tuple((item_id, told.reason(items[item_id])) for item_id in ordered)


class _Told:
    """Words for one situation."""

    def __init__(
        self, *, situation: Situation, forecast: Forecast, items: dict[int, Item], places: dict[int, int]
    ) -> None:
        self.situation = situation
        self.forecast = forecast
        self.items = items
        self.places = places
        self.devices = {device.uuid: device for device in situation.devices}

    def reason(self, item: Item) -> Reason:
        planned = self.forecast.planned.get(item.id)
        starts_at, ends_at = (None, None) if planned is None else (planned.starts_at, planned.ends_at)
        block = self.forecast.blocks.get(item.id)
        text = self._of_devices(item, planned) if block is None else self._of_block(item, block)
        return Reason(text=text, starts_at=starts_at, ends_at=ends_at)

    def _of_block(self, item: Item, block: Block) -> str:
        now = self.situation.now
        match block:
            case Block.NOT_PLANNED:
                return "its memory and time are not predicted yet"
            case Block.NOT_BEFORE:
                return f"starts at {clock(item.not_before or now, now)} at the earliest, as asked"
            case Block.AFTER:
                return self._of_predecessors(item)
            case Block.NO_DEVICE:
                return self._of_no_device(item)
            case Block.DEVICE_QUOTA:
                return self._of_device_quota(item)
            case Block.HOUR_QUOTA:
                hours = self.situation.user(item.owner).device_hours_a_week or 0.0
                usage = self.situation.usage.get(item.owner)
                used = 0.0 if usage is None else usage.week_s / HOUR_S
                return (
                    f"{item.owner} has used {used:.1f} of {hours:g} device-hours a week; with what runs "
                    "and this it would be more"
                )

    def _of_predecessors(self, item: Item) -> str:
        for other in item.after:
            state = self.situation.ended.get(other)
            if state is not None and state is not ItemState.DONE:
                return f"follows item {other}, which is {state.value}"
        left = [other for other in item.after if self.situation.ended.get(other) is not ItemState.DONE]
        text = f"follows {self._name(left[0])}"
        if len(left) > 1:
            text += f" and {len(left) - 1} more"
        ends = [self._end_of(other) for other in left]
        if None in ends:
            return text
        last = max(end for end in ends if end is not None)
        return f"{text}, predicted to end at about {clock(last, self.situation.now)}"

    def _of_no_device(self, item: Item) -> str:
        assert item.demand is not None
        way = item.demand.narrowest
        alike = [device for device in self.situation.devices if device.kind == way.kind]
        if not alike:
            return f"needs {_need(way)} of a kind ({way.kind}) that is not here now"
        if len(alike) < way.width:
            return f"needs {_need(way)}; there are {len(alike)} now"
        largest = max(device.usable_bytes for device in alike)
        return f"needs {_need(way)}; other programs leave {gib(largest)} at most now"

    def _of_device_quota(self, item: Item) -> str:
        quota = self.situation.user(item.owner).max_devices
        mine = [one for one in self.situation.items if one.owner == item.owner and one.place is not None]
        ends = [(self._end_of(one.id) or self.situation.now, one) for one in mine]
        text = f"{item.owner} may have {quota} device{'s' if quota != 1 else ''} at once"
        if not ends:
            return text
        ends_at, first = min(ends, key=lambda end: (end[0], end[1].id))
        return f"{text}; {self._name(first.id)} ends at about {clock(ends_at, self.situation.now)}"

    def _of_devices(self, item: Item, planned: Planned | None) -> str:
        assert item.demand is not None
        if planned is None:
            return f"needs {_need(item.demand.narrowest)}; when they are free is not known"
        way = item.demand.ways[planned.place.way]
        if planned.follows is None:
            return "starts now"
        at = clock(planned.starts_at, self.situation.now)
        where, need = self._where(planned.place.device_uuids), _need(way)
        if kept := self._kept_from(item, way):
            first = self.forecast.kept_for or 0
            begins = self.forecast.planned.get(first)
            when = "" if begins is None else f" from about {clock(begins.starts_at, self.situation.now)} on"
            where = f"{self._where(kept)} {_is(kept)} kept for {self._name(first)}"
            return f"needs {need}; {where}{when}, which this would delay"
        other = self.items.get(planned.follows)
        if other is None or not other.is_placed:
            before = self.places.get(item.id, 0) - 1
            queue = f"; {before} item{'s' if before != 1 else ''} before it" if before > 0 else ""
            return f"needs {need}{queue}; follows {self._name(planned.follows)} on {where} at about {at}"
        verb = "stops to make room" if other.state is ItemState.STOPPING else "ends"
        until = f"until about {at}, when {self._name(other.id)} {verb}"
        has = "has" if way.width == 1 else "have"
        free_bytes = self._free_bytes(planned)
        if way.bytes_each > free_bytes:
            return f"needs {need}; {where} {has} {gib(max(0, free_bytes))} free {until}"
        if not (shares(item, way) and shares(other, way_of(other))):
            return (
                f"needs {need}, not beside others; {where} {_is(planned.place.device_uuids)} in use {until}"
            )
        return f"needs {need}; {where} {has} the memory, but is too busy to share {until}"

    def _kept_from(self, item: Item, way: Way) -> tuple[str, ...]:
        """Return free devices that an item would fit and does not get, as they are kept for the first."""
        if item.id == self.forecast.kept_for:
            return ()
        used = {uuid for one in self.items.values() if one.place for uuid in one.place.device_uuids}
        free = [device for device in self.devices.values() if device.uuid not in used]
        large = [one for one in free if one.kind == way.kind and way.bytes_each <= one.usable_bytes]
        kept = sorted(one.uuid for one in large if one.uuid in self.forecast.kept)
        return tuple(kept) if len(large) >= way.width else ()

    def _where(self, device_uuids: Sequence[str]) -> str:
        labels = [device_label(self.devices[uuid], self.situation.devices) for uuid in device_uuids]
        return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"

    def _free_bytes(self, planned: Planned) -> int:
        """Return what is free now on the fullest of the devices."""
        booked = dict.fromkeys(planned.place.device_uuids, 0)
        for item in self.items.values():
            if item.place is not None:
                for uuid in booked.keys() & {*item.place.device_uuids}:
                    booked[uuid] += item.place.bytes_each
        return min(self.devices[uuid].usable_bytes - taken for uuid, taken in booked.items())

    def _name(self, item_id: int) -> str:
        if is_expected(item_id):
            return "what is likely to be submitted until then"
        item = self.items.get(item_id)
        return f"item {item_id}" if item is None else f"item {item_id} ({item.name})"

    def _end_of(self, item_id: int) -> float | None:
        planned = self.forecast.planned.get(item_id)
        return self.forecast.running.get(item_id) if planned is None else planned.ends_at


def device_label(device: Device, devices: tuple[Device, ...]) -> str:
    """Return a device's name for users: its index, and its node where there are several."""
    label = f"GPU {device.index}" if device.uuid.upper().startswith(("GPU", "MIG")) else device.name
    several = any(other.node != device.node for other in devices)
    return f"{label} of {device.node}" if several else label


def _is(device_uuids: Sequence[str]) -> str:
    return "is" if len(device_uuids) == 1 else "are"


def _need(way: Way) -> str:
    if way.width == 1:
        return gib(way.bytes_each)
    return f"{way.width} devices with {gib(way.bytes_each)} each"


def clock(at: float, now: float) -> str:
    """Return a time of this machine's day, with the date if it is another day's."""
    then, today = (datetime.fromtimestamp(when).astimezone() for when in (at, now))
    return f"{then:%H:%M}" if then.date() == today.date() else f"{then:%Y-%m-%d %H:%M}"
