"""The service under load: clients that read and submit, a long queue, many running studies (fake drivers).

    python -m benchmarks.serve_load --clients 200 --queued 1000 --running 400 --seconds 60

A server of its own on loopback, in its two processes, with the real queue, loop, picture and application
over SQLite; only devices and drivers are fakes (`tests/service/fake_drivers.py`), and plans are known.  The
load comes from locust (pip install locust), which takes about as much of a core as the server.  Prints
latencies by kind of request, the processor time of the server's processes, and their memory.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from autosft.profiles.child_python import python

NUM_SHARING = 4  # items on a device


def serve(port: int, folder: Path, *, num_queued: int, num_running: int) -> None:
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
        service.planner.answers = lambda question: (
            FITS if question["kind"] == "fits" else prediction(may_share=True, load=1 / NUM_SHARING)
        )
        made = way(gib=15, seconds=7200.0, may_share=True, load=1 / NUM_SHARING)
        for number in range(num_queued + num_running):
            one = submission(f"study-{number:05d}", owner=f"user-{number % 20}", demand=Demand(ways=(made,)))
            service.queue.submit(one, now=time.time())
        command = [sys.executable, "-m", "benchmarks.serve_load", "--scheduler"]
        command += ["--folder", str(folder), "--running", str(num_running)]
        service.scheduler = LoopChild(command, None, clock=time.time, publish=service.hub.publish)
        service.scheduler.begin()
        gc.collect()
        gc.freeze()
        uvicorn.run(create_app(service), host="127.0.0.1", port=port, log_level="warning", access_log=False)


def schedule(folder: Path, *, num_running: int) -> None:
    """Be the scheduler's process, over fakes."""
    import os

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
    script = Script(seconds=7200.0)
    world = World(queue, now=time.time(), devices=devices, script=lambda _: script)
    drivers = FakeDrivers(world)
    loop = Loop(queue, devices=FakeDevices(world), drivers=drivers, clock=time.time)
    uses = tuple(DeviceUse(device=each, free_bytes=20 * GIB) for each in devices)
    live = LiveBoard(queue, loop, clock=time.time, uses=lambda _: uses)

    def pass_time() -> None:
        while True:
            with contextlib.suppress(Exception):
                world.advance(max(0.0, time.time() - world.now))
            time.sleep(0.5)

    threading.Thread(target=pass_time, daemon=True).start()
    with os.fdopen(os.dup(1), "wb") as out:
        parts = Parts(queue=queue, loop=loop, live=live, drivers=drivers, url="")
        Work(parts, Outbox(out)).run(commands)


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


def main() -> None:
    options = argparse.ArgumentParser()
    for name, default in (("clients", 200), ("queued", 1000), ("running", 400), ("seconds", 60)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options.add_argument("--scheduler", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given: Any = options.parse_args()
    if given.scheduler:
        schedule(given.folder, num_running=given.running)
        return
    if given.serve:
        serve(given.serve, given.folder, num_queued=given.queued, num_running=given.running)
        return
    with tempfile.TemporaryDirectory() as name, socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        place.close()
        numbers = ["--queued", str(given.queued), "--running", str(given.running)]
        command = [sys.executable, "-m", "benchmarks.serve_load", "--serve", str(port), "--folder", name]
        server = subprocess.Popen([*command, *numbers])
        try:
            wait_for(port, given.running)
            both = {"answers": psutil.Process(server.pid)}
            [both["schedules"]] = both["answers"].children()
            before = {name: cost(process) for name, process in both.items()}
            began = time.monotonic()
            rows = locust(port, Path(name), num_clients=given.clients, seconds=given.seconds)
            took = time.monotonic() - began
            after = {name: cost(process) for name, process in both.items()}
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
    print(f"load of the machine: {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")


if __name__ == "__main__":
    main()
