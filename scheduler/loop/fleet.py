"""The study's devices: on a cluster they join and leave while it runs.  Writes `Loop.fleet`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.scheduler.events import Note
from autosft.scheduler.loop.state import DeviceGroup, Fleet, Loop
from autosft.scheduler.study_run import Slots, StudyRun, planning_class


def initial_fleet(run: StudyRun) -> Fleet:
    """Return the fleet before the first refresh: the devices that the study was planned for."""
    return Fleet(known={slots.device.uuid: slots for slots in run.slots})


def refresh_fleet(loop: Loop) -> None:
    """Update the fleet to the available devices, and report those that joined or left."""
    fleet = loop.fleet
    there = {device.uuid: device for device in loop.devices.devices().devices}
    if there.keys() == fleet.present:
        return
    before, is_start = fleet.present or frozenset(), fleet.present is None
    for uuid, device in there.items():
        if uuid not in fleet.known:
            fleet.known[uuid] = loop.run.share(device)
            if fleet.known[uuid] is None:
                message = "it does not support what this study has pinned (kind of device, precision, TF32)"
                loop.observe(Note(message=f"{label(device)} is not used: {message}."))
        if uuid not in before and fleet.known[uuid] is not None and not is_start:
            loop.observe(Note(message=f"{label(device)} has joined."))
    for uuid in sorted(before - there.keys()):
        if (slots := fleet.known[uuid]) is not None:
            loop.observe(Note(message=f"{label(slots.device)} has left."))
    fleet.present = frozenset(there)
    fleet.slots = {uuid: slots for uuid in sorted(there) if (slots := fleet.known[uuid]) is not None}
    regroup(loop)


def shrink(loop: Loop, uuid: str, num_bytes: int) -> None:
    """Plan from now on with no more than `num_bytes` free on a device."""
    fleet = loop.fleet
    slots = fleet.slots[uuid]
    smaller = replace(slots, device=replace(slots.device, free_bytes=num_bytes))
    fleet.known[uuid] = smaller
    fleet.slots[uuid] = smaller
    regroup(loop)


def regroup(loop: Loop) -> None:
    """Group the devices that are used."""
    fleet = loop.fleet
    fleet.group_of = {uuid: group_name(slots) for uuid, slots in fleet.slots.items()}
    fleet.groups = device_groups(fleet, within_node=loop.run.store_url is not None)


def device_groups(fleet: Fleet, *, within_node: bool) -> dict[str, DeviceGroup]:
    """Group the devices in use; each group is planned for its device with the least memory.

    `within_node`: a gang needs a folder that all its ranks see; with a URL as --output, only the ranks of one
    node share one.
    """
    groups = {}
    for name in dict.fromkeys(fleet.group_of.values()):
        alike = [fleet.slots[uuid] for uuid, other in fleet.group_of.items() if other == name]
        smallest = min(alike, key=lambda slots: usable_bytes(slots.device))
        by_node = Counter(slots.device.node for slots in alike)
        num_devices = max(by_node.values()) if within_node else len(alike)
        groups[name] = DeviceGroup(slots=smallest, num_devices=num_devices)
    return groups


def group_name(slots: Slots) -> str:
    """Return a name shared by all devices that one plan suits."""
    return f"{planning_class(slots.device)}, {slots.num_slots} x {slots.num_threads}"


def is_device_missing(loop: Loop) -> bool:
    """Whether a device that took part is not available now."""
    fleet = loop.fleet
    return any(slots is not None and uuid not in fleet.slots for uuid, slots in fleet.known.items())


def is_split_by_cores(loop: Loop, uuid: str) -> bool:
    """Whether each trial on a device has cores of its own."""
    slots = loop.fleet.known.get(uuid)
    return slots is not None and slots.device.kind.traits.is_split_by_cores


def label(device: DeviceProfile) -> str:
    return f"{device.name} ({device.uuid}) on {device.node}"
