"""Users of the service for locust: they look at the queue, at items and devices, and submit and cancel.

locust -f benchmarks/harnesses/serve_users.py --headless -u 200 -r 50 -t 60s --host http://127.0.0.1:8099
"""

from __future__ import annotations

import random
import uuid
from typing import ClassVar

from locust import FastHttpUser, between, task


class Person(FastHttpUser):
    """Somebody with the page open, a script that polls, and a study to submit now and then."""

    wait_time = between(0.5, 1.5)
    known: ClassVar[list[int]] = []

    def on_start(self) -> None:
        if not self.known:
            found = self.client.get("/studies?limit=100", name="first look").json()["items"]
            self.known.extend(item["id"] for item in found)

    @task(6)
    def list_queue(self) -> None:
        self.client.get("/studies?limit=100", name="read: list")

    @task(4)
    def show_item(self) -> None:
        self.client.get(f"/studies/{random.choice(self.known)}", name="read: item")

    @task(2)
    def list_devices(self) -> None:
        self.client.get("/devices", name="read: devices")

    @task(2)
    def page(self) -> None:
        self.client.get("/page/board", name="read: page")

    @task(1)
    def known_plan(self) -> None:
        self.client.get("/fits?model=Llama-3.1-8B&device=A100-80GB", name="read: fits")

    @task(2)
    def submit(self) -> None:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        with self.client.post(
            "/studies", json={"arguments": {"trials": 4}}, headers=headers, name="submit", catch_response=True
        ) as answer:
            number = answer.json()["id"] if answer.status_code == 201 else None
        if number is not None:
            self.client.post(f"/studies/{number}/cancel", name="change: cancel")
