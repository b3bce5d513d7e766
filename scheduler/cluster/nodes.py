"""The nodes of a cluster: their devices, and whether they see the same files."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.workers.runners.node import missing_here, profile_this_node

#: Interval between checks for nodes that have joined or left, in seconds.
POLL_S = 1.0
#: Timeout for a node's answer, in seconds: its first task may have to start Python.
ANSWER_S = 60.0


class Nodes(Protocol):
    """The other nodes of a cluster."""

    def other_nodes(self) -> dict[str, str]:
        """Return the names of the live nodes, by id."""
        ...

    def on_node(self, node: str, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Run a function on a node."""
        ...


class NodeDevices:
    """The devices of all nodes of a cluster, kept up to date as nodes join and leave.

    Each node is asked once, by a task that runs there.  Devices that two raylets of one machine share count
    for the first of them.
    """

    def __init__(
        self,
        nodes: Nodes,
        here: ClusterProfile,
        *,
        is_asked: Callable[[DeviceProfile], bool] = lambda _: True,
        poll_s: float = POLL_S,
    ) -> None:
        """Ask the current nodes, and keep asking in a thread; `here` are this node's devices.

        Of all, here and there, those are taken that `is_asked` holds for.
        """
        self.node_of: dict[str, str] = {}  # node of each device that is not here, by UUID
        self._nodes = nodes
        self._here = replace(here, devices=tuple(filter(is_asked, here.devices)))
        self._is_asked = is_asked
        self._poll_s = poll_s
        self._asked: dict[str, Future[ClusterProfile]] = {}
        self._names: dict[str, str] = {}
        self._now = self._here
        self._leaving = threading.Event()
        self._lock = threading.Lock()  # guards `look`
        self.look(timeout_s=ANSWER_S)
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._thread.start()

    def devices(self) -> ClusterProfile:
        """Return the available devices."""
        return self._now

    def close(self) -> None:
        """Stop asking; call it before leaving the cluster: a late request would reconnect to it."""
        self._leaving.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._leaving.wait(self._poll_s):
            self.look_again()

    def look_again(self) -> None:
        """Update the devices, without waiting for the answers of new nodes."""
        with contextlib.suppress(
            Exception
        ):  # the cluster is gone: code that runs trials on it will report that
            self.look(timeout_s=0)

    def look(self, *, timeout_s: float) -> None:
        """Update the devices, waiting up to `timeout_s` for the answers of new nodes."""
        with self._lock:
            self._look(timeout_s)

    def _look(self, timeout_s: float) -> None:
        names = self._nodes.other_nodes()
        for node in names.keys() - self._asked.keys():
            self._asked[node] = self._nodes.on_node(node, profile_this_node)
        for node in self._asked.keys() - names.keys():
            del self._asked[node]
        wait(self._asked.values(), timeout=timeout_s)
        by_uuid = {device.uuid: device for device in self._here.devices}
        for node in sorted(names):
            for device in _result(self._asked[node]):
                if device.uuid not in by_uuid and self._is_asked(device):
                    # Two raylets of one machine have the same name; a gang must not span them by mistake.
                    by_uuid[device.uuid] = replace(device, node=f"{names[node]}/{node[:6]}")
                    self.node_of[device.uuid] = node  # kept: an attempt may still be running there
        self._now = replace(self._here, devices=tuple(by_uuid.values()))


def _result(asked: Future[ClusterProfile]) -> tuple[DeviceProfile, ...]:
    """Return a node's answer; nothing if it has not answered, or has left."""
    return asked.result().devices if asked.done() and asked.exception() is None else ()


def require_everywhere(nodes: Nodes, paths: Mapping[str, Path], *, remedy: str) -> None:
    """Raise UserError unless every node has the paths of these flags; folders have to be shared.

    Folders with the same path on two nodes need not be the same: a file written to one must be seen in the
    other.
    """
    if not (names := nodes.other_nodes()):
        return
    with contextlib.ExitStack() as stack:
        probes = {str(stack.enter_context(_probe(path))): flag for flag, path in paths.items()}
        asked = {node: nodes.on_node(node, missing_here, list(probes)) for node in names}
        for node, answer in asked.items():
            for probe in answer.result(ANSWER_S):
                flag = probes[probe]
                raise UserError(
                    f"{flag} {paths[flag]}: node {names[node]} of the cluster does not have it.",
                    remedy=remedy,
                )


@contextlib.contextmanager
def _probe(path: Path) -> Iterator[Path]:
    """Yield a new file in a folder; a file is yielded itself."""
    if not path.is_dir():
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=path, prefix=".autosft-probe-") as probe:
        yield Path(probe.name)
