"""The server that the suite kills: the product's, over HTTP, whose items are studies without a model.

    python -m tests.faults.served '{"url": ..., "folder": ..., "port": ...}'

Everything is the product's but two parts: what an item needs is known, and its driver is `driver.py`
(`served_loop.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from autosft.commands import serve
from autosft.commands.service_flags import TyperCommandLine
from autosft.profiles.hardware.discover import profile_hardware
from autosft.service import server
from autosft.service.devices import device_kind
from autosft.service.requests.limits import Limits
from autosft.service.settings import Settings
from autosft.service.values import Demand, Way
from autosft.studies.wire import to_plain
from tests.faults import served_loop

RUN_S = 40.0
NEED_BYTES = 256 << 20


class KnowingPlanner:
    """Says the same of every item: three fit side by side."""

    num_waiting = 0

    def __init__(self, *_: object, **__: object) -> None:
        [device] = profile_hardware("cpu").devices
        way = Way(
            kind=device_kind(device),
            width=1,
            bytes_each=NEED_BYTES,
            seconds=RUN_S,
            seconds_low=RUN_S / 2,
            seconds_high=RUN_S * 2,
            load=0.3,
            may_share=True,
        )
        self._answer = {"demand": to_plain(Demand(ways=(way,))), "refusal": "", "lines": []}

    def ask(self, _question: Mapping[str, Any], *, urgency: int = 1) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._answer)
        return future

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    given = json.loads(sys.argv[1])
    folder = Path(given["folder"])
    server.Planner = KnowingPlanner  # type: ignore[misc, assignment]
    server.loop_process = served_loop
    settings = Settings(
        storage=given["url"],
        folder=folder / "service",
        limits=Limits(folders=(), outputs=folder / "outputs"),
        port=given["port"],
        hardware="cpu",
    )
    with server.open_server(settings, TyperCommandLine()) as opened:
        serve.serve_http(opened, settings, on_stop="keep")


if __name__ == "__main__":
    main()
