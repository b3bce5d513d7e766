"""The devices of a Ray cluster that a server hands out: those of its own machine and of the other nodes.

Other nodes are asked by a process of its own (`watch_nodes`), since Ray ends a process whose head stays away.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.profiles.hardware.discover import load_profile, save_profile
from autosft.profiles.hardware.leases import Leases
from autosft.service import watch_nodes
from autosft.service.devices import MachineDevices, device_from
from autosft.service.values import Device

#: How long nodes are waited for at the start; a file that is as old means that they are gone.
FIRST_S, SILENT_S = 120.0, 30.0
#: Between the end of a watcher and the start of the next.
AGAIN_S = 5.0


class NodeWatch:
    """Follows the devices of a cluster's other nodes, one watcher after another, until it is closed."""

    def __init__(self, address: str, file: Path, *, log: Path | None = None) -> None:
        """`file` is where the watcher writes what it finds."""
        self._command = python("-m", watch_nodes.__name__, address, str(file))
        self._file, self._log = file, log
        self._num_changes: str | int | None = None
        self._on_change: Callable[[], None] = lambda: None
        self._error: UserError | None = None
        self._first, self._is_over = threading.Event(), threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name="nodes", daemon=True)

    def begin(self, on_change: Callable[[], None]) -> None:
        """Start watching; `on_change` is called in a thread of this object."""
        self._on_change = on_change
        self._file.unlink(missing_ok=True)
        self._thread.start()

    def wait(self, timeout_s: float = FIRST_S) -> None:
        """Wait for the first answer.  Raises UserError for a cluster that cannot be used."""
        self._first.wait(timeout_s)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the watcher."""
        self._is_over.set()
        if (process := self._process) is not None:
            process.kill()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _work(self) -> None:
        while not self._is_over.is_set():
            with contextlib.ExitStack() as stack:
                errors = subprocess.DEVNULL
                if self._log is not None:
                    errors = stack.enter_context(self._log.open("ab")).fileno()
                process = self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,  # Ctrl+C is the server's
                )
                assert process.stdout is not None
                for line in process.stdout:
                    self._hear(json.loads(line))
                process.wait()
            self._first.set()
            self._is_over.wait(AGAIN_S)

    def _hear(self, said: dict[str, str | int | None]) -> None:
        if "error" in said:
            self._error = UserError(
                str(said["error"]), remedy=None if said["remedy"] is None else str(said["remedy"])
            )
            return
        if (found := said["num_changes"]) != self._num_changes:
            self._num_changes = found
            self._on_change()
        self._error = None
        self._first.set()


class NodeFile:
    """What the watcher has written; read by whoever places something, in any process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: tuple[int, tuple[DeviceProfile, ...]] = (0, ())

    def devices(self) -> tuple[DeviceProfile, ...]:
        """Return what the other nodes have; nothing while the cluster does not answer."""
        try:
            found = self._path.stat()
            if time.time() - found.st_mtime > SILENT_S:
                return ()
            if found.st_ino != self._known[0]:
                self._known = found.st_ino, load_profile(self._path).devices
        except (OSError, UserError):  # there is none yet
            return ()
        return self._known[1]


class ClusterDevices:
    """The devices of a cluster.

    Without GPUs here, and where nothing else was asked for, this machine hands out none of its own: it is a
    node for the server and its drivers.
    """

    def __init__(
        self, here: MachineDevices, nodes: NodeFile, *, has_own: bool, leases: Leases | None = None
    ) -> None:
        self._here, self._nodes, self._has_own = here, nodes, has_own
        self._leases = leases or Leases()

    @property
    def cluster(self) -> ClusterProfile:
        """The devices as they were found."""
        own = self._here.cluster.devices if self._has_own else ()
        return replace(self._here.cluster, devices=(*own, *self._nodes.devices()))

    def save(self, path: Path) -> None:
        """Write the devices as they are now, for what plans with them; nothing while there is none."""
        if (cluster := self.cluster).devices:
            part = path.with_suffix(".part")
            save_profile(cluster, part)
            part.replace(path)

    def read(self, own_pids: Collection[int]) -> tuple[Device, ...]:
        own = self._here.read(own_pids) if self._has_own else ()
        return (*own, *(self._elsewhere(profile, own_pids) for profile in self._nodes.devices()))

    def _elsewhere(self, profile: DeviceProfile, own_pids: Collection[int]) -> Device:
        """Return another node's device: what was free when it was asked, but for what others have leased.

        All drivers of this machine lease here what they use there.
        """
        others = [lease for lease in self._leases.held(profile.uuid) if lease.pid not in own_pids]
        return device_from(profile, others, own_pids=own_pids)


HandedOut = MachineDevices | ClusterDevices


def devices_of(hardware: str, gpus: str | None, *, address: str | None, nodes_file: Path) -> HandedOut:
    """Return the devices of this machine, with `address` those of the cluster's other nodes, too."""
    here = MachineDevices(hardware, gpus=gpus)
    if address is None:
        return here
    has_gpu = any(device.kind.traits.is_gpu for device in here.cluster.devices)
    return ClusterDevices(here, NodeFile(nodes_file), has_own=has_gpu or hardware != "auto")
