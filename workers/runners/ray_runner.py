"""Run trials on Ray, through a pool of small actors that start, monitor and stop processes on their nodes.

The actors import no training library and hold no device; the process of an attempt is forked from the node's
warm server (`workers.processes`).  Actors are reused for later attempts: starting one takes 0.4 s.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autosft.profiles.errors import StudyFailedError
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrialEvent, TrialJob
from autosft.workers.processes.failures import told
from autosft.workers.processes.starters import (
    WARM_IMPORTS,
    Connector,
    SocketChannel,
    Starter,
    WarmServer,
    prepare,
)
from autosft.workers.runners.attempt_monitor import (
    PREPARE_FUNCTION,
    TRAIN_FUNCTION,
    Attempt,
    end_of,
    wait_until_gone,
)

# A trial may report a step every few milliseconds, and each message costs Ray and the driver about two.
BATCH_S = 0.01


class TrialActor:
    """Monitors the ranks of an attempt on this node, one attempt at a time."""

    def __init__(self) -> None:
        self._attempt: Attempt | None = None
        self._prepared: SocketChannel | None = None
        # Requests to stop an attempt that arrived before it had started: method calls run concurrently.
        self._early_stops: dict[tuple[int, int], StopReason] = {}
        self._lock = threading.Lock()

    def run(
        self, job: TrialJob, ranks: Sequence[int], server: Path | Any, options: Mapping[str, Any]
    ) -> Iterator[list[TrialEvent]]:
        """Yield an attempt's events in batches; `server` is a socket path or the actor that owns it."""
        try:
            prepared, self._prepared = self._prepared, None
            attempt = Attempt(Connector(_socket_path(server), prepared), job, ranks=ranks, **options)
        except (OSError, RayError) as error:
            message = f"the warm server cannot be reached: {error}"
            failure, message = told(job, FailureKind.WORKER_LOST, message)
            yield [end_of(job, failure, message)]
            return
        with self._lock:
            self._attempt = attempt
            reason = self._early_stops.get((job.trial, job.attempt))
            self._early_stops.clear()
        if reason is not None:
            attempt.stop(reason)
        for batch in _batches(attempt):
            if isinstance(batch[-1], AttemptEnd):
                self._attempt = None  # before the driver can give this actor the next attempt
            yield batch

    def prepare(self, job: TrialJob, server: Path | Any, function: str) -> None:
        """Have a process preload what an attempt like `job` needs."""
        with contextlib.suppress(OSError, RayError):  # the attempt will report it
            self._prepared = prepare(_socket_path(server), function, job)

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        """Ask the attempt to end, if it is the one running or about to start."""
        with self._lock:
            running = self._running(trial, attempt)
            if running is None:
                self._early_stops[trial, attempt] = reason
        if running is not None:
            running.stop(reason)

    def kill(self, trial: int, attempt: int, why: str) -> None:
        """Kill the attempt, if it is the one running."""
        if (running := self._running(trial, attempt)) is not None:
            running.kill(why)

    def _running(self, trial: int, attempt: int) -> Attempt | None:
        running = self._attempt
        if running is not None and (running.job.trial, running.job.attempt) == (trial, attempt):
            return running
        return None


def _socket_path(server: Path | Any) -> Path:
    """Return the socket path of a warm server, asking the actor that owns it if need be."""
    return server if isinstance(server, Path) else ray.get(server.socket_path.remote())


def _batches(attempt: Attempt) -> Iterator[list[TrialEvent]]:
    """Yield an attempt's events in batches: Ray should not carry each of a burst separately."""
    events: queue.SimpleQueue[TrialEvent] = queue.SimpleQueue()

    def collect() -> None:
        for event in attempt.events():
            events.put(event)

    threading.Thread(target=collect, daemon=True).start()
    batch: list[TrialEvent] = []
    while not batch or not isinstance(batch[-1], AttemptEnd):
        batch = [events.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(events.get_nowait())
        yield batch
        time.sleep(BATCH_S)


class NodeServer:
    """Owns the warm server of a node other than the driver's."""

    def __init__(self, imports: Sequence[str]) -> None:
        self._server = WarmServer(imports=imports)

    def socket_path(self) -> Path:
        """Return the server's socket path, restarting the server if it has died."""
        return self._server.ensure()

    def wait_until_gone(self, job: TrialJob) -> bool:
        return wait_until_gone(self._server.socket_path, job)


@dataclass(slots=True, eq=False)
class _Running:
    """An attempt whose end has not been delivered to the driver."""

    job: TrialJob
    started: float
    parts: list[_Part]
    last: Measurement | None = None
    ends: list[AttemptEnd] = field(default_factory=list)  # of the parts that have ended, in order of arrival
    lead_end: AttemptEnd | None = None  # of the part with rank 0


@dataclass(slots=True, eq=False)
class _Part:
    """The ranks of an attempt on one node, while they run."""

    ranks: tuple[int, ...]
    node: str | None
    actor: Any
    events: Any  # ray.ObjectRefGenerator


class RayTrialRunner:
    """A `TrialRunner` over the nodes of a Ray cluster."""

    def __init__(
        self,
        starter: Starter,
        *,
        wait_until_ready: Callable[[], None],
        node_of: Mapping[str, str] | None = None,
        on_node_lost: Callable[[], None] = lambda: None,
        function: str = TRAIN_FUNCTION,
        prepare_function: str | None = None,
        imports: Sequence[str] = WARM_IMPORTS,
        **options: Any,
    ) -> None:
        """Run attempts on this node's warm server `starter`, and on other nodes' where a device is there.

        `wait_until_ready` returns once Ray is up, and raises if it has failed.  `node_of` maps the UUIDs of
        other nodes' devices to Ray node ids, and may grow; `imports` are for the warm servers there.
        `prepare_function` preloads for `function`; training has a default.  `on_node_lost` is called before
        the end of an attempt on a dead node is reported, so that nothing is placed there again: attempts on a
        dead node are lost at once, and a few of them fail a trial.  Further options are those of
        `attempt_monitor.Attempt`.
        """
        assert isinstance(starter, WarmServer), "Ray runs where fork does"
        self._starter = starter
        self._node_of: Mapping[str, str] = {} if node_of is None else node_of
        self._wait_until_ready = wait_until_ready
        self._on_node_lost = on_node_lost
        self._options = {"function": function, **options}
        self._imports = tuple(imports)
        self._running: dict[tuple[int, int], _Running] = {}
        self._prepare_function = prepare_function
        if function == TRAIN_FUNCTION and prepare_function is None:
            self._prepare_function = PREPARE_FUNCTION
        self._idle: dict[str | None, list[Any]] = {}  # by node; None is the driver's
        # Per node, an actor that holds a preloading process, and the Ray object that becomes ready with it.
        self._prepared: dict[str | None, tuple[Any, Any]] = {}
        self._servers: dict[str, Any] = {}

    def run(self, job: TrialJob) -> None:
        """Start an attempt on the nodes of its devices."""
        key = job.trial, job.attempt
        assert key not in self._running, f"attempt {key} runs already"
        self._wait_until_ready()
        ranks: dict[str | None, list[int]] = {}
        for rank, uuid in enumerate(job.device_uuids):
            ranks.setdefault(self._node_of.get(uuid), []).append(rank)
        parts = [self._start(job, node, tuple(here)) for node, here in ranks.items()]
        self._running[key] = _Running(job=job, started=time.monotonic(), parts=parts)

    def _start(self, job: TrialJob, node: str | None, ranks: tuple[int, ...]) -> _Part:
        actor = self._take_prepared(node) if len(job.device_uuids) == 1 else None
        actor = actor or self._take_idle(node)
        # What `ray list tasks`, Ray's dashboard and `ps` show.
        name = f"TrialActor: trial {job.trial}, attempt {job.attempt}"
        options = {"num_returns": "streaming", "name": name}
        events = actor.run.options(**options).remote(job, ranks, self._server_of(node), self._options)
        return _Part(ranks=ranks, node=node, actor=actor, events=events)

    def _take_idle(self, node: str | None) -> Any:
        idle = self._idle.setdefault(node, [])
        return idle.pop() if idle else _remote(TrialActor, node, max_concurrency=4)

    def _take_prepared(self, node: str | None) -> Any | None:
        actor, ready = self._prepared.get(node, (None, None))
        if actor is None or not ray.wait([ready], timeout=0.0)[0]:
            return None
        del self._prepared[node]
        return actor

    def prepare(self, job: TrialJob) -> None:
        """Have a process on the job's node preload for a job like it, unless one there already does."""
        node = self._node_of.get(job.device_uuids[0])
        if self._prepare_function is None or node in self._prepared:
            return
        self._wait_until_ready()
        actor = self._take_idle(node)
        ready = actor.prepare.remote(job, self._server_of(node), self._prepare_function)
        self._prepared[node] = actor, ready

    def _server_of(self, node: str | None) -> Path | Any:
        if node is None:
            with contextlib.suppress(OSError):  # the attempt will not reach it, and tell why
                self._starter.ensure()
            return self._starter.socket_path
        if node not in self._servers:
            self._servers[node] = _remote(
                NodeServer, node, self._imports, max_restarts=-1, max_task_retries=-1
            )
        return self._servers[node]

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        """Return new events, waiting up to `timeout_s` for the first."""
        by_stream = {
            part.events: (running, part) for running in self._running.values() for part in running.parts
        }
        self._wait_until_ready()  # also while nothing runs: it keeps our handling of signals
        if not by_stream:
            time.sleep(timeout_s)
            return ()
        events: list[TrialEvent] = []
        deadline = time.monotonic() + timeout_s
        ready, _ = ray.wait(list(by_stream), num_returns=1, timeout=timeout_s)
        while ready:
            for stream in ready:
                running, part = by_stream[stream]
                events += self._next_events(running, part)
                if part not in running.parts:
                    del by_stream[stream]
            if not by_stream:
                break
            # The end of a single part of a gang is not reported.
            left_s = 0.0 if events else max(0.0, deadline - time.monotonic())
            num_returns = len(by_stream) if events else 1
            ready, _ = ray.wait(list(by_stream), num_returns=num_returns, timeout=left_s)
        return events

    def _next_events(self, running: _Running, part: _Part) -> list[TrialEvent]:
        try:
            events: list[TrialEvent] = ray.get(next(part.events))
        except (RayError, StopIteration) as error:
            # The actor or its node is gone.  Its connection closes with it, and the server kills the attempt.
            self._wait_until_gone(running.job, part)
            if part.node is not None and not _is_alive(part.node):
                self._on_node_lost()
            if (reason := _why_not_started(error)) is not None:
                end = end_of(running.job, FailureKind.NOT_STARTED, reason)
            else:
                message = f"the actor that monitored this attempt is gone ({type(error).__name__})"
                end = end_of(running.job, FailureKind.WORKER_LOST, message)
            return self._part_ended(running, part, end)
        delivered: list[TrialEvent] = []
        for event in events:
            if isinstance(event, Measurement):
                running.last = event
                delivered.append(event)
            else:
                self._idle[part.node].append(part.actor)
                delivered += self._part_ended(running, part, event)
        return delivered

    def _part_ended(self, running: _Running, part: _Part, end: AttemptEnd) -> list[TrialEvent]:
        """Record the end of a part; return the attempt's if it was the last, kill the rest if it failed."""
        job = running.job
        running.parts.remove(part)
        running.ends.append(end)
        if 0 in part.ranks:
            running.lead_end = end
        if running.parts:
            if end.failure is not None:  # the others would wait for it in vain
                for other in running.parts:
                    other.actor.kill.remote(job.trial, job.attempt, "killed with the rest of its gang")
            return []
        del self._running[job.trial, job.attempt]
        return [_end_of_gang(running)]

    def _wait_until_gone(self, job: TrialJob, part: _Part) -> None:
        with contextlib.suppress(OSError, RayError):  # the server or the node is gone, and all with it
            if part.node is None:
                wait_until_gone(self._starter.socket_path, job)
            elif _is_alive(part.node):
                ray.get(self._servers[part.node].wait_until_gone.remote(job), timeout=10.0)

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        """Ask an attempt to end; does nothing if it is over."""
        if (running := self._running.get((trial, attempt))) is not None:
            for part in running.parts:
                part.actor.stop.remote(trial, attempt, reason)

    def now(self) -> float:
        """Return UNIX seconds."""
        return time.time()

    def close(self, *, grace_s: float) -> None:
        """Stop all attempts, wait up to `grace_s`, then kill the rest and all actors; discards events.

        Where Ray itself is gone nothing is asked of it, which would take its time-outs: whoever started it
        kills what is left.
        """
        has_actors = self._running or self._prepared or self._servers or any(self._idle.values())
        if has_actors and not self._is_ray_lost():
            self._stop_all(grace_s=grace_s)
        self._running.clear()
        self._idle.clear()
        self._prepared.clear()
        self._servers.clear()

    def _stop_all(self, *, grace_s: float) -> None:
        """Stop all attempts, then kill all actors."""
        for trial, attempt in self._running:
            self.stop(trial, attempt, StopReason.SHUTDOWN)
        deadline = time.monotonic() + grace_s
        while self._running and (left_s := deadline - time.monotonic()) > 0:
            self.events(left_s)
        left = [(running.job, part) for running in self._running.values() for part in running.parts]
        actors = [*(part.actor for _, part in left), *(actor for actor, _ in self._prepared.values())]
        for actor in (*actors, *(a for idle in self._idle.values() for a in idle), *self._servers.values()):
            with contextlib.suppress(RayError):
                ray.kill(actor)
        for job, part in left:
            self._wait_until_gone(job, part)

    def _is_ray_lost(self) -> bool:
        try:
            self._wait_until_ready()
        except StudyFailedError:
            return True
        return False


def _end_of_gang(running: _Running) -> AttemptEnd:
    """Return how an attempt ended whose parts have all ended.

    When one part fails the others are lost with it: a lost part is the cause only if there is no other.
    """
    failed = [end for end in running.ends if end.failure is not None]
    causes = [end for end in failed if end.failure is not FailureKind.WORKER_LOST]
    end = next(iter((*causes, *failed)), running.lead_end)
    assert end is not None, "one part has the first rank"
    if end.duration_s:
        return end
    last = running.last  # the lost part could not report its progress
    return replace(
        end,
        peak_allocated_bytes=last.peak_allocated_bytes if last else None,
        peak_reserved_bytes=last.peak_reserved_bytes if last else None,
        duration_s=time.monotonic() - running.started,
    )


def _why_not_started(error: BaseException) -> str | None:
    """Return why an actor could not be created, None for one that was; such as a failed import.

    Ray's message quotes tracebacks; the last exception in it is the cause.
    """
    if not isinstance(error, RayActorError) or not error.actor_init_failed:
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return [*lines, *exceptions][-1]


def _is_alive(node: str) -> bool:
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def _remote(cls: type, node: str | None, *arguments: object, **options: Any) -> Any:
    """Start an actor on a node (None: the driver's)."""
    node_id = node or ray.get_runtime_context().get_node_id()
    there = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    return ray.remote(cls).options(num_cpus=0, scheduling_strategy=there, **options).remote(*arguments)
