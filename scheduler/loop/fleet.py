"""Which devices there are: on a cluster they join and leave while a study runs."""

from __future__ import annotations

from collections import Counter

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.scheduler.events import Note
from autosft.scheduler.loop.state import Kind, Loop
from autosft.scheduler.study_run import Slots, sort_of


def look_at_devices(loop: Loop) -> None:
    """Take over the devices that are there now, and tell of those that have come or gone."""
    there = {one.uuid: one for one in loop.source.devices().devices}
    if there.keys() == loop.present:
        return
    before, is_start = loop.present or frozenset(), loop.present is None
    for uuid, device in there.items():
        if uuid not in loop.seen:
            loop.seen[uuid] = loop.run.share(device)
            if loop.seen[uuid] is None:
                loop.observe(
                    Note(message=f"{named(device)} takes no part: it cannot do what this study pins.")
                )
        if uuid not in before and loop.seen[uuid] is not None and not is_start:
            loop.observe(Note(message=f"{named(device)} has joined."))
    for uuid in sorted(before - there.keys()):
        if (slots := loop.seen[uuid]) is not None:
            loop.observe(Note(message=f"{named(slots.device)} has left."))
    loop.present = frozenset(there)
    loop.slots = {uuid: slots for uuid in sorted(there) if (slots := loop.seen[uuid]) is not None}
    loop.kind_of = {uuid: kind_name(slots) for uuid, slots in loop.slots.items()}
    loop.kinds = {}
    for uuid, slots in loop.slots.items():
        name = loop.kind_of[uuid]
        alike = loop.kinds.get(name)
        # All of a kind take what is planned for the one with the least memory.
        least = slots if alike is None else min(alike.slots, slots, key=lambda one: usable_bytes(one.device))
        loop.kinds[name] = Kind(slots=least, num_devices=num_together(loop, name))


def num_together(loop: Loop, kind: str) -> int:
    """Return how many devices of a kind a gang can have.

    Its ranks meet in a folder that all of them see: with a URL as --output those of one node.
    """
    nodes = [loop.slots[uuid].device.node for uuid, name in loop.kind_of.items() if name == kind]
    return len(nodes) if loop.run.store_url is None else max(Counter(nodes).values())


def kind_name(slots: Slots) -> str:
    """Name what devices have in common that one plan suits all."""
    return f"{sort_of(slots.device)}, {slots.num_slots} x {slots.num_threads}"


def named(device: DeviceProfile) -> str:
    return f"{device.name} ({device.uuid}) of {device.node}"
