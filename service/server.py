"""The server's parts put together: queue, devices, drivers, loop, planner, picture, application."""

from __future__ import annotations

import contextlib
import getpass
import logging
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.discover import save_profile
from autosft.profiles.masking import has_password
from autosft.service.api.app import create_app
from autosft.service.api.context import Service
from autosft.service.api.submissions import plan_the_unplanned
from autosft.service.board import DeviceUse
from autosft.service.cluster_devices import ClusterDevices, NodeWatch
from autosft.service.decide.situation import Policy
from autosft.service.devices import MachineDevices
from autosft.service.drivers.command import DriverCommand, driver_command
from autosft.service.drivers.process_drivers import ProcessDrivers
from autosft.service.drivers.study_progress import study_progress
from autosft.service.live import LiveBoard, uses_of
from autosft.service.loop import Loop
from autosft.service.requests import planner_process
from autosft.service.requests.flags import CommandLine
from autosft.service.requests.limits import Limits
from autosft.service.requests.planner import Planner
from autosft.service.store.queue_store import open_queue
from autosft.service.store.server_lease import ServedElsewhereError
from autosft.service.trial_events import TrialWatch
from autosft.service.values import Device, Item, ItemState, Role, User
from autosft.studies.store.records import open_records
from autosft.studies.values import Driver

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: Commands that keep what they find in the database.
_RECORDED = ("tune", "train", "evaluate")
STOP_NOTE = "The server was stopped; it goes on from its checkpoints when one is started."


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the admin has asked for."""

    storage: str
    folder: Path  # of the server: logs of items, configurations, its planner's log
    limits: Limits
    host: str = "127.0.0.1"
    port: int = 8090
    host_names: tuple[str, ...] = ()  # by which others reach it, such as behind a proxy
    hardware: str = "auto"
    gpus: str | None = None
    address: str | None = None  # of a Ray cluster that this machine is a node of
    is_behind_tls: bool = False
    policy: Policy = field(default_factory=Policy)

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    def hosts(self) -> frozenset[str]:
        """Return what a request's Host may be."""
        here = {self.host, *(LOOPBACK if self.is_loopback else ())}
        return frozenset(
            name
            for host in here | set(self.host_names)
            for bare in [f"[{host}]" if ":" in host and not host.startswith("[") else host]
            for name in (bare, f"{bare}:{self.port}")
        )

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def require_safe(settings: Settings, users: Sequence[User]) -> None:
    """Raise UserError for a server that strangers could use, or that would tell a password."""
    if has_password(settings.storage):
        raise UserError(
            "--storage holds a password, which all users of this machine could see in the list of processes.",
            remedy="Keep it in ~/.pgpass, and give postgresql://USER@HOST/DATABASE.",
        )
    if not settings.is_loopback and all(user.is_revoked for user in users):
        raise UserError(
            f"--host {settings.host} can be reached from other machines, and no user has a token.",
            remedy="Add one: autosft serve users add NAME --role admin.  Or leave --host out.",
        )


def local_user(settings: Settings, users: Sequence[User]) -> User | None:
    """Return who asks without a token: on loopback, and while nobody has one, whoever is on this machine."""
    if settings.is_loopback and all(user.is_revoked for user in users):
        return User(name=_login(), role=Role.ADMIN)
    return None


def _login() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = "local"
    return "".join(letter for letter in name if letter.isalnum() or letter in "-_.")[:50] or "local"


class Server:
    """A server that has been put together; `begin`, then `end`."""

    def __init__(
        self, service: Service, loop: Loop, live: LiveBoard, drivers: ProcessDrivers, url: str
    ) -> None:
        self.service, self.app = service, create_app(service)
        self._loop, self._live, self._drivers, self._url = loop, live, drivers, url
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.replaced = threading.Event()  # another server has taken over

    app: ASGIApp

    def devices(self) -> tuple[DeviceUse, ...]:
        """Return the devices as they are now."""
        return self._live.uses()

    def begin(self) -> None:
        """Become the queue's server, and begin to look at it.  Raises ServedElsewhereError."""
        self._loop.begin(Driver.current())
        self._loop.announce(self._url)
        self._live.begin()
        self.service.planner.warm_up()
        plan_the_unplanned(self.service)
        for name, work in (("loop", self._run_loop), ("picture", self._live.run)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def drain(self) -> None:
        """Start nothing more, and end the streams of events: the server stops."""
        self._live.is_draining = True
        self._is_over.set()
        self._loop.wake()
        self._live.wake()
        self.service.hub.close()

    def end(self, *, checkpoint: bool) -> None:
        """Stop; what runs goes on, or with `checkpoint` ends with one, and goes on with the next server."""
        self.drain()
        for thread in self._threads[:1]:
            thread.join(timeout=30)
        if checkpoint:
            self._stop_all()
        self._live.end()
        for thread in self._threads[1:]:
            thread.join(timeout=10)
        with contextlib.suppress(Exception):
            self._loop.end()
        self.service.planner.close()

    def _run_loop(self) -> None:
        try:
            self._loop.run(self._is_over.is_set)
        except ServedElsewhereError:
            logger.exception("Another server has taken over.")
            self.replaced.set()

    def _stop_all(self) -> None:
        queue = self.service.queue
        for item in queue.items({ItemState.STARTING, ItemState.RUNNING}):
            stopped = queue.stop(
                item.id, launch=item.launch, then=ItemState.PREEMPTED, note=STOP_NOTE, now=time.time()
            )
            if stopped is not None:
                self._drivers.stop(stopped)


@contextmanager
def open_server(settings: Settings, command_line: CommandLine, *, dashboard: Any = None) -> Iterator[Server]:
    """Put a server together.  Raises UserError for what cannot be served."""
    with ExitStack() as stack:
        queue = stack.enter_context(closing(open_queue(settings.storage)))
        users = queue.users.list()
        require_safe(settings, users)
        records = stack.enter_context(closing(open_records(settings.storage)))
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.limits.outputs.mkdir(mode=0o700, parents=True, exist_ok=True)
        profile = settings.folder / "devices.json"
        devices = stack.enter_context(handed_out(settings, profile))
        planner = Planner(
            python("-m", planner_process.__name__, str(profile), settings.storage),
            log=settings.folder / "planner.log",
            decisive=(profile,),
        )
        stack.callback(planner.close)
        drivers = ProcessDrivers(
            settings.folder / "items",
            database=settings.storage,
            command=lambda item, given: recorded(item, given, settings),
            progress=study_progress(records),
        )
        loop = Loop(queue, devices=devices, drivers=drivers, clock=time.time, policy=settings.policy)
        live = LiveBoard(queue, loop, clock=time.time, uses=lambda placed: uses_of(devices.cluster, placed))
        service = Service(
            queue=queue,
            records=records,
            scheduler=live,
            planner=planner,
            limits=settings.limits,
            command_line=command_line,
            spool=settings.folder / "configurations",
            log_of=lambda item: _existing(drivers.log_path(item.id)),
            local_user=local_user(settings, users),
            hosts=settings.hosts(),
            is_public=settings.is_behind_tls,
            dashboard=dashboard,
        )
        live.listen(service.hub.publish)
        watch = TrialWatch(records.trial_states)

        def tell_trials(placed: Collection[Item]) -> None:
            for owner, data in watch.look(placed):
                service.hub.tell("trial", owner, data)

        live.measure_also(tell_trials)
        yield Server(service, loop, live, drivers, settings.url)


@contextmanager
def handed_out(settings: Settings, profile: Path) -> Iterator[MachineDevices | ClusterDevices]:
    """Give the devices that are handed out, and keep `profile`, which predictions rest on, up to date."""
    here = MachineDevices(settings.hardware, gpus=settings.gpus)
    if settings.address is None:
        save_profile(here.cluster, profile)
        yield here
        return
    has_gpu = any(device.kind.traits.is_gpu for device in here.cluster.devices)
    nodes = NodeWatch(settings.address, settings.folder / "nodes.json", log=settings.folder / "nodes.log")
    devices = ClusterDevices(here, nodes, has_own=has_gpu or settings.hardware != "auto")
    with closing(nodes):
        nodes.begin(on_change=lambda: devices.save(profile))
        nodes.wait()
        if not devices.cluster.devices:
            raise UserError(
                f"--address {settings.address}: no other node of the cluster has a device, and "
                "there is no GPU here.",
                remedy="Have the nodes join first (ray start), or hand out the cores here: --hardware cpu.",
            )
        devices.save(profile)
        yield devices


def recorded(item: Item, devices: Sequence[Device], settings: Settings) -> DriverCommand:
    """Return an item's command with this server's database."""
    made = driver_command(item, devices, hardware=settings.hardware, address=settings.address)
    argv = list(made.argv)
    if item.arguments.command in _RECORDED:
        at = argv.index("--") if "--" in argv else len(argv)
        argv.insert(at, f"--storage={settings.storage}")
    # The command is run here: a server in this one's environment is not asked.
    return DriverCommand(argv=tuple(argv), environment={**made.environment, "AUTOSFT_SERVER": ""})


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
