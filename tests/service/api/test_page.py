"""The page, as a person sees it: in headless Chromium, at 400 and 1200 pixels, light and dark."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from autosft.service.api.app import create_app
from autosft.service.api.context import Service
from autosft.service.board import DeviceUse
from tests.service.api.chromium import PROGRAM, Page, opened
from tests.service.api.fakes import ADA, GIB, ROOT, client, device, run, served, tokens
from tests.service.api.studies import example_study

SCRIPT = "<script>alert(1)</script>"


@contextlib.contextmanager
def listening(folder: Path, **changes: Any) -> Iterator[tuple[str, Service]]:
    """A service with an item of each state, on a port of its own."""
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    port = place.getsockname()[1]
    with served(folder, hosts=frozenset({f"127.0.0.1:{port}"}), **changes) as service:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{port}", service
        finally:
            service.hub.close()
            server.should_exit = True
            thread.join(timeout=30)


def filled(service: Service) -> int:
    """Fill the queue; return the item that runs."""
    hosts, service.hosts = service.hosts, frozenset({"127.0.0.1:8090"})
    by = client(service)
    names = ["study", "a-name-that-is-as-long-as-the-names-that-scripts-make-0123456789-0123456789", "held"]
    numbers = [by.post("/studies", json={"name": name}).json()["id"] for name in names]
    by.post(f"/studies/{numbers[2]}/hold", json={"note": SCRIPT})
    service.hosts = hosts
    running = run(service, service.queue.get(numbers[0]))
    log = service.log_of(running)
    assert log is not None
    log.write_text("trial 0 starts\n")
    example_study(service.records, service.limits.outputs / "root")
    use = DeviceUse(
        device=dataclasses.replace(device(0), name="NVIDIA A100-SXM4-80GB"),
        booked=((numbers[0], 22 * GIB),),
        measured=((numbers[0], 19 * GIB),),
        others_bytes=3 * GIB,
        free_bytes=58 * GIB,
    )
    service.scheduler.devices = (use,)
    return int(numbers[0])


def test_a_page_without_a_browser_has_what_the_queue_has(tmp_path: Path) -> None:
    with served(tmp_path, local_user=ROOT) as service:
        item = filled(service)
        by = client(service)
        text = by.get("/").text
        for said in (
            "GPU 0 has 8.1 GiB free until about 14:20",  # why it waits
            "22.0 GiB booked, 55.0 GiB left",  # predicted
            "19.0 GiB ours, 3.0 GiB others&#39;, 58.0 GiB free",  # measured
            "predicted start",
        ):
            assert said in text
        assert SCRIPT not in text
        assert "&lt;script&gt;" in text
        assert "eval_loss" in by.get(f"/page/items/{item}").text
        figure = by.get(f"/page/items/{item}/figures").json()
        assert [one["name"] for one in figure["data"]][-1] == "best (trial 0)"


def test_nobody_known_is_sent_to_sign_in(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        answer = client(service).get("/", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")


#: Its script has begun.
READY = "document.querySelector('form button')?.disabled === false"


async def look(page: Page, base: str, item: int) -> None:
    for path in ("/", f"/page/items/{item}", "/page/new", f"/page/items/{item}/trials/0"):
        for width, dark in ((400, False), (400, True), (1200, False)):
            await page.open(base + path, width=width, dark=dark)
            wide = await page.value("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path} is {wide} pixels too wide at {width}"
            ground = await page.value("getComputedStyle(document.documentElement).backgroundColor")
            assert (sum(map(int, ground[4:-1].split(","))) < 150) is dark, ground
    await page.open(f"{base}/page/items/{item}")
    await page.until("document.querySelectorAll('#curves .trace').length >= 2")  # drawn
    await page.until("document.querySelector('[data-log]').textContent.includes('trial 0 starts')")
    await page.open(f"{base}/page/items/{item}/trials/0")
    await page.until("document.querySelector('[data-log]').textContent.includes('step 2')")
    assert page.errors == []


async def use(page: Page, base: str, service: Service) -> None:
    await page.open(base)
    waiting = service.queue.items()[1]
    await page.until("document.readyState === 'complete'")
    await page.value(f"document.querySelector('[data-post=\"/studies/{waiting.id}/hold\"]').click()")
    await page.until(f"!!document.querySelector('[data-post=\"/studies/{waiting.id}/release\"]')")
    assert service.queue.get(waiting.id).state.value == "held"
    service.hub.tell("queue", None, {"length": 0})  # what somebody else does comes in by itself
    await page.open(f"{base}/page/new")
    await page.until(READY)
    script = "document.querySelector('[name=lines]').value = 'trials = 5\\nlearning_rate = 1e-4'"
    await page.value(f"{script}; document.querySelector('form button').click()")
    await page.until("location.pathname.startsWith('/page/items/')")
    made = service.queue.items()[-1]
    assert dict(made.arguments.flags)["--learning-rate"] == "1e-4"
    await page.until(READY)
    script = "document.querySelector('#clone textarea').value = 'learning_rate = 2e-4\\nwarmup_ratio = 0.1'"
    await page.value(f"{script}; document.querySelector('#clone form button').click()")
    await page.until(f"!location.pathname.endsWith('/{made.id}')")
    clone = service.queue.items()[-1]
    flags = dict(clone.arguments.flags)
    assert (flags["--learning-rate"], flags["--warmup-ratio"], "--trials" in flags) == ("2e-4", "0.1", False)
    assert clone.cloned_from == made.id
    await page.open(f"{base}/page/new")
    await page.until(READY)
    await page.value("document.querySelector('[name=lines]').value = 'learning_rat = 1'")
    await page.value("document.querySelector('form button').click()")
    await page.until("document.getElementById('problem').textContent.includes('Did you mean learning_rate?')")


async def sign_in(page: Page, base: str, token: str) -> None:
    await page.open(base)
    assert await page.value("location.pathname") == "/login"
    await page.until(READY)
    await page.value(f"document.querySelector('[name=token]').value = '{token}'")
    await page.value("document.querySelector('form button').click()")
    await page.until("location.pathname === '/' && document.readyState === 'complete'")
    assert "ada" in await page.value("document.querySelector('.who').textContent")
    assert await page.value("document.cookie") == ""  # no script reads the token


needs_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here")


@needs_browser
@pytest.mark.slow
def test_it_is_readable_at_any_width_in_light_and_dark(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path, local_user=ROOT) as (base, service):
            async with opened(tmp_path / "chromium") as page:
                await look(page, base, filled(service))

    asyncio.run(main())


@needs_browser
@pytest.mark.slow
def test_it_holds_submits_and_clones(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path, local_user=ROOT) as (base, service):
            filled(service)
            async with opened(tmp_path / "chromium") as page:
                await use(page, base, service)

    asyncio.run(main())


@needs_browser
@pytest.mark.slow
def test_signing_in_with_a_token(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path) as (base, service):
            [token] = tokens(service, ADA).values()
            async with opened(tmp_path / "chromium") as page:
                await sign_in(page, base, token)

    asyncio.run(main())
