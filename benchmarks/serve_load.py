"""The service under load: clients that read and submit, a long queue, many running studies (fake drivers).

    python -m benchmarks.serve_load --clients 200 --queued 1000 --running 400 --seconds 60

A server of its own on loopback, in a process of its own, with the real queue, loop, picture and application
over SQLite; only devices and drivers are fakes (`tests/service/fake_drivers.py`), and plans are known.  The
load comes from locust (pip install locust), which takes about as much of a core as the server.  Prints
latencies by kind of request, the server's processor time, and its memory before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
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
    import uvicorn

    from autosft.service.api.app import create_app
    from autosft.service.board import DeviceUse
    from autosft.service.live import LiveBoard
    from autosft.service.loop import Loop
    from autosft.service.values import Demand
    from autosft.studies.values import Driver
    from tests.service.api.fakes import FITS, ROOT, prediction, served
    from tests.service.examples import GIB, device, submission, way
    from tests.service.fake_drivers import FakeDevices, FakeDrivers, Script, World

    host = f"127.0.0.1:{port}"
    with served(folder, local_user=ROOT, hosts=frozenset({host}), clock=time.time) as service:
        service.planner.answers = lambda question: (
            FITS if question["kind"] == "fits" else prediction(may_share=True, load=1 / NUM_SHARING)
        )
        made = way(gib=15, seconds=7200.0, may_share=True, load=1 / NUM_SHARING)
        for number in range(num_queued + num_running):
            one = submission(f"study-{number:05d}", owner=f"user-{number % 20}", demand=Demand(ways=(made,)))
            service.queue.submit(one, now=time.time())
        devices = tuple(device(number) for number in range(num_running // NUM_SHARING))
        script = Script(seconds=7200.0)
        world = World(service.queue, now=time.time(), devices=devices, script=lambda _: script)
        loop = Loop(service.queue, devices=FakeDevices(world), drivers=FakeDrivers(world), clock=time.time)
        uses = tuple(DeviceUse(device=each, free_bytes=20 * GIB) for each in devices)
        live = LiveBoard(service.queue, loop, clock=time.time, uses=lambda _: uses)
        live.listen(service.hub.publish)
        service.scheduler = live
        loop.begin(Driver.current())
        live.begin()

        def pass_time() -> None:
            while True:
                with contextlib.suppress(Exception):
                    world.advance(max(0.0, time.time() - world.now))
                time.sleep(0.5)

        for work in (pass_time, live.run, lambda: loop.run(lambda: False)):
            threading.Thread(target=work, daemon=True).start()
        uvicorn.run(create_app(service), host="127.0.0.1", port=port, log_level="warning", access_log=False)


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


def main() -> None:
    options = argparse.ArgumentParser()
    for name, default in (("clients", 200), ("queued", 1000), ("running", 400), ("seconds", 60)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given: Any = options.parse_args()
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
            process = psutil.Process(server.pid)
            before, used = process.memory_info().rss, process.cpu_times()
            began = time.monotonic()
            rows = locust(port, Path(name), num_clients=given.clients, seconds=given.seconds)
            took = time.monotonic() - began
            after, used_after = process.memory_info().rss, process.cpu_times()
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
    cpu = used_after.user + used_after.system - used.user - used.system
    print(f"server: {cpu / took:.2f} cores, {before >> 20} MiB before, {after >> 20} MiB after")
    print(f"load of the machine: {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")


if __name__ == "__main__":
    main()
