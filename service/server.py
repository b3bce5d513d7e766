"""The server's parts put together: queue, scheduler's process, planner's process, application."""

from __future__ import annotations

import gc
import getpass
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.discover import save_profile
from autosft.profiles.masking import has_password
from autosft.service import loop_process
from autosft.service.api.app import create_app
from autosft.service.api.context import Service
from autosft.service.api.events import Hub
from autosft.service.api.submissions import plan_the_unplanned
from autosft.service.board import DeviceUse
from autosft.service.cluster_devices import ClusterDevices, HandedOut, NodeWatch, devices_of
from autosft.service.drivers.process_drivers import log_path
from autosft.service.live import uses_of
from autosft.service.loop_child import LoopChild, SchedulerDiedError
from autosft.service.requests import planner_process
from autosft.service.requests.flags import CommandLine
from autosft.service.requests.planner import Planner
from autosft.service.settings import Settings
from autosft.service.store.queue_store import open_queue
from autosft.service.values import Role, User
from autosft.studies.store.records import open_records


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

    def __init__(self, service: Service, child: LoopChild, devices: HandedOut) -> None:
        self.service, self.app = service, create_app(service)
        self._child, self._devices = child, devices

    app: ASGIApp

    @property
    def is_replaced(self) -> bool:
        """Whether another server has taken over."""
        return self._child.replaced.is_set()

    def devices(self) -> tuple[DeviceUse, ...]:
        """Return the devices as they are now, without what runs on them."""
        return uses_of(self._devices.cluster, ())

    def begin(self) -> None:
        """Become the queue's server, and begin to look at it.  Raises ServedElsewhereError."""
        try:
            self._child.begin()
        except SchedulerDiedError as error:
            raise UserError(f"The scheduler could not be started. {error}") from error
        self.service.planner.warm_up()
        plan_the_unplanned(self.service)
        # What is imported stays: no collection of garbage, and no request that one falls into, looks at it.
        gc.collect()
        gc.freeze()

    def drain(self) -> None:
        """Start nothing more, and end the streams of events: the server stops."""
        self._child.drain()
        self.service.hub.close()

    def end(self, *, checkpoint: bool) -> None:
        """Stop; what runs goes on, or with `checkpoint` ends with one, and goes on with the next server."""
        self.drain()
        self._child.end(checkpoint=checkpoint)
        self.service.planner.close()


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
        hub = Hub()
        child = LoopChild(
            python("-m", loop_process.__name__),
            settings,
            clock=time.time,
            publish=hub.publish,
            tell_trial=lambda owner, data: hub.tell("trial", owner, data),
        )
        service = Service(
            queue=queue,
            records=records,
            scheduler=child,
            planner=planner,
            limits=settings.limits,
            command_line=command_line,
            spool=settings.folder / "configurations",
            log_of=lambda item: _existing(log_path(settings.items_folder, item.id)),
            local_user=local_user(settings, users),
            hosts=settings.hosts(),
            is_public=settings.is_behind_tls,
            dashboard=dashboard,
            hub=hub,
        )
        yield Server(service, child, devices)


@contextmanager
def handed_out(settings: Settings, profile: Path) -> Iterator[HandedOut]:
    """Give the devices that are handed out, and keep `profile`, which predictions rest on, up to date."""
    devices = devices_of(
        settings.hardware, settings.gpus, address=settings.address, nodes_file=settings.nodes_file
    )
    if not isinstance(devices, ClusterDevices):
        save_profile(devices.cluster, profile)
        yield devices
        return
    assert settings.address is not None
    with closing(
        NodeWatch(settings.address, settings.nodes_file, log=settings.folder / "nodes.log")
    ) as nodes:
        nodes.begin(on_change=lambda: devices.save(profile))
        nodes.wait()
        if not devices.cluster.devices:
            raise UserError(
                f"--address {settings.address}: no other node of the cluster has a device, and "
                "there is no GPU here.",
                remedy="Have the nodes join first (ray start), or hand out the cores here: --hardware cpu.",
            )
        yield devices


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
