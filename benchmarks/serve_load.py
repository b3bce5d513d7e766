"""The service under load: clients that read and submit, a long queue, many running studies (fake drivers).

    python -m benchmarks.serve_load --clients 200 --queued 1000 --running 400 --seconds 60
    python -m benchmarks.serve_load --items 10000

A server of its own on loopback, in its two processes, with the real queue, loop, picture and application
over SQLite; only devices and drivers are fakes (`tests/service/fake_drivers.py`), and plans are known.  The
load comes from locust (pip install locust), which takes about as much of a core as the server.  Prints
latencies by kind of request, the processor time of the server's processes, their
memory, and how long decisions took, in processor time of their thread.  With `--items`, so many short items
are submitted over HTTP and run to their end, and memory is printed as they do.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import pickle
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from autosft.profiles.child_python import python

NUM_SHARING = 4  # items on a device


class KnownPlans:
    """A planner that knows everything, and keeps nothing."""

    num_waiting = 0

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def ask(self, question: Any, *, urgency: int = 1) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._answers[question["kind"]])
        return future


def serve(port: int, folder: Path, *, num_queued: int, num_running: int, run_seconds: float) -> None:
    """Serve a queue of this length until the process is ended."""
    import gc

    import uvicorn

    from autosft.service.api.app import create_app
    from autosft.service.loop_child import LoopChild
    from autosft.service.values import Demand
    from tests.service.api.fakes import FITS, ROOT, prediction, served
    from tests.service.examples import submission, way

    host = f"127.0.0.1:{port}"
    with served(folder, local_user=ROOT, hosts=frozenset({host}), clock=time.time) as service:
        answers = {"fits": FITS, "item": prediction(may_share=True, load=1 / NUM_SHARING)}
        service.planner = KnownPlans(answers)
        made = way(gib=15, seconds=7200.0, may_share=True, load=1 / NUM_SHARING)
        for number in range(num_queued + num_running if num_queued else 0):
            one = submission(f"study-{number:05d}", owner=f"user-{number % 20}", demand=Demand(ways=(made,)))
            service.queue.submit(one, now=time.time())
        command = [sys.executable, "-m", "benchmarks.serve_load", "--scheduler"]
        command += ["--folder", str(folder), "--running", str(num_running), "--run-seconds", str(run_seconds)]
        service.scheduler = LoopChild(command, None, clock=time.time, publish=service.hub.publish)
        service.scheduler.begin()
        gc.collect()
        gc.freeze()
        uvicorn.run(create_app(service), host="127.0.0.1", port=port, log_level="warning", access_log=False)


def schedule(folder: Path, *, num_running: int, run_seconds: float) -> None:
    """Be the scheduler's process, over fakes."""
    import os

    from autosft.service import loop as loop_module
    from autosft.service.board import DeviceUse
    from autosft.service.live import LiveBoard
    from autosft.service.loop import Loop
    from autosft.service.loop_process import Outbox, Parts, Work
    from autosft.service.store.queue_store import open_queue
    from tests.service.examples import GIB, device
    from tests.service.fake_drivers import FakeDevices, FakeDrivers, Script, World

    commands = os.fdopen(os.dup(0), "rb")
    pickle.load(commands)
    queue = open_queue(f"sqlite:///{folder}/studies.db")
    devices = tuple(device(number) for number in range(num_running // NUM_SHARING))
    script = Script(seconds=run_seconds)
    world = World(queue, now=time.time(), devices=devices, script=lambda _: script)
    drivers = FakeDrivers(world)
    loop = Loop(queue, devices=FakeDevices(world), drivers=drivers, clock=time.time)
    uses = tuple(DeviceUse(device=each, free_bytes=20 * GIB) for each in devices)
    live = LiveBoard(queue, loop, clock=time.time, uses=lambda _: uses)

    decide = loop_module.decide

    def timed(situation: Any) -> Any:
        began = time.thread_time()
        found = decide(situation)
        with (folder / "decisions").open("a", encoding="ascii") as file:
            file.write(f"{1e3 * (time.thread_time() - began):.3f}\n")
        return found

    loop_module.decide = timed

    def pass_time() -> None:
        while True:
            with contextlib.suppress(Exception):
                world.advance(max(0.0, time.time() - world.now))
                forget(world)
            time.sleep(0.5)

    threading.Thread(target=pass_time, daemon=True).start()
    with os.fdopen(os.dup(1), "wb") as out:
        parts = Parts(queue=queue, loop=loop, live=live, drivers=drivers, url="")
        Work(parts, Outbox(out)).run(commands)


def forget(world: Any) -> None:
    """Keep nothing of the world's processes that ended a minute ago: it is not what is measured."""
    old = [one for one in world.processes.values() if one.is_gone and one.ends_at < world.now - 60.0]
    for process in old:
        del world.processes[process.launch]
        world.worked_s.pop(process.item, None)
        world.stopped.discard(process.launch)
    world.ran.clear()


def wait_for(port: int, num_running: int) -> None:
    """Wait until the server answers and as many run as shall."""
    from autosft.profiles.errors import UserError
    from autosft.service.client import Client

    with Client(f"http://127.0.0.1:{port}") as client:
        while True:
            with contextlib.suppress(UserError):
                if len(client.items(state="running", limit=2000)) >= num_running:
                    return
            time.sleep(1.0)


def locust(port: int, folder: Path, *, num_clients: int, seconds: int) -> list[dict[str, str]]:
    """Load the server; return locust's rows by kind of request."""
    users = Path(__file__).parent / "harnesses" / "serve_users.py"
    command = ["-m", "locust", "-f", str(users), "--headless", "--only-summary", "--loglevel", "ERROR"]
    command += ["-u", str(num_clients), "-r", "20", "-t", f"{seconds}s", "--reset-stats"]
    command += ["--host", f"http://127.0.0.1:{port}", "--csv", str(folder / "load")]
    subprocess.run(python(*command), check=False, stdout=subprocess.DEVNULL)
    with (folder / "load_stats.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cost(process: psutil.Process) -> tuple[float, int]:
    """Return what a process has used of a core, in seconds, and the bytes that it holds."""
    used = process.cpu_times()
    return used.user + used.system, process.memory_info().rss


def flow(port: int, folder: Path, processes: dict[str, psutil.Process], num_items: int) -> None:
    """Submit so many items over HTTP, at most 1,000 open at a time, and print memory as they end."""
    from autosft.service.client import Client

    print(f"{num_items} items, each a second long, through 400 places; MiB after so many ended")
    with (
        Client(f"http://127.0.0.1:{port}") as client,
        contextlib.closing(sqlite3.connect(f"file:{folder}/studies.db?mode=ro", uri=True)) as database,
        ThreadPoolExecutor(4) as threads,
    ):
        num_ended, num_submitted, told = 0, 0, 0
        while num_ended < num_items:
            more = min(num_items - num_submitted, 1000 - (num_submitted - num_ended))
            list(threads.map(lambda _: client.submit("tune", {"trials": 4}), range(more)))
            num_submitted += more
            client.items(limit=100)
            query = "SELECT count(*) FROM autosft_service_items WHERE state = 'done'"
            [[num_ended]] = database.execute(query)
            if num_ended // 1000 > told or num_ended == num_items:
                told = num_ended // 1000
                held = ", ".join(f"{name} {cost(each)[1] / 2**20:.1f}" for name, each in processes.items())
                print(f"{num_ended:>6}: {held}", flush=True)
            time.sleep(0.2 if more else 1.0)


def decided(folder: Path) -> str:
    """Say how long decisions have taken."""
    times = sorted(map(float, (folder / "decisions").read_text(encoding="ascii").split()))
    p99 = times[int(0.99 * (len(times) - 1))]
    median = times[len(times) // 2]
    return f"{len(times)} decisions: {median:.1f} ms median, {p99:.1f} p99, {times[-1]:.1f} largest"


def main() -> None:
    options = argparse.ArgumentParser()
    for name, default in (("clients", 200), ("queued", 1000), ("running", 400), ("seconds", 60)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--items", type=int, help="run so many to their end, without clients")
    options.add_argument("--run-seconds", type=float, default=7200.0, help=argparse.SUPPRESS)
    options.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options.add_argument("--scheduler", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given: Any = options.parse_args()
    if given.scheduler:
        schedule(given.folder, num_running=given.running, run_seconds=given.run_seconds)
        return
    if given.serve:
        serve(
            given.serve,
            given.folder,
            num_queued=given.queued,
            num_running=given.running,
            run_seconds=given.run_seconds,
        )
        return
    with tempfile.TemporaryDirectory() as name, socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        place.close()
        queued, seconds = (0, 1.0) if given.items else (given.queued, given.run_seconds)
        numbers = ["--queued", str(queued), "--running", str(given.running), "--run-seconds", str(seconds)]
        command = [sys.executable, "-m", "benchmarks.serve_load", "--serve", str(port), "--folder", name]
        server = subprocess.Popen([*command, *numbers])
        try:
            wait_for(port, 0 if given.items else given.running)
            both = {"answers": psutil.Process(server.pid)}
            [both["schedules"]] = both["answers"].children()
            if given.items:
                flow(port, Path(name), both, given.items)
                print(decided(Path(name)))
                return
            before = {name: cost(process) for name, process in both.items()}
            began = time.monotonic()
            rows = locust(port, Path(name), num_clients=given.clients, seconds=given.seconds)
            took = time.monotonic() - began
            after = {name: cost(process) for name, process in both.items()}
            decisions = decided(Path(name))
        finally:
            server.kill()
            server.wait()
    print(f"{given.clients} clients, {given.queued} queued, {given.running} running, {given.seconds} s")
    print("request          number  failed   /s     median   p95     p99     worst (ms)")
    for row in rows:
        print(
            f"{row['Name'] or 'all':15} {row['Request Count']:>7} {row['Failure Count']:>7} "
            f"{float(row['Requests/s']):6.1f} {row['50%']:>8} {row['95%']:>7} {row['99%']:>7} "
            f"{row['100%']:>7}"
        )
    for name, (used_s, num_bytes) in after.items():
        share, mib = (used_s - before[name][0]) / took, before[name][1] >> 20
        print(f"process that {name}: {share:.2f} cores, {mib} MiB before, {num_bytes >> 20} MiB after")
    print(decisions)
    print(f"load of the machine: {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")


if __name__ == "__main__":
    main()
