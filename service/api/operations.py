"""`/healthz`, `/readyz`, `/metrics`, `/devices`, `/events`: for those who run the server, and live."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, Depends, HTTPException, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from autosft.service.api import models
from autosft.service.api.context import Asking, Service, The, whose
from autosft.service.api.events import MAX_LISTENERS
from autosft.service.api.shown import shown_device
from autosft.service.values import ItemState

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def is_alive() -> models.Health:
    """Answer as long as this process does."""
    return models.Health(status="ok")


@router.get("/readyz", responses={503: {"model": models.Health}})
def is_ready(service: The, response: Response) -> models.Health:
    """Answer 200 where the database can be reached and the queue is being looked at."""
    reasons = []
    try:
        service.queue.server()
    except Exception:  # of whatever kind: it is not ready, and the log has the rest
        reasons.append("the database does not answer")
    if not service.scheduler.is_alive():
        reasons.append("the scheduler has not looked at the queue for a while")
    if service.scheduler.board().is_draining:
        reasons.append("the server is stopping")
    response.status_code = 503 if reasons else 200
    return models.Health(status="not ready" if reasons else "ok", reasons=reasons)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def read_metrics(service: The) -> Response:
    """Return figures for Prometheus; they name users, but no study."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(service))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/devices", response_model=models.Devices)
async def list_devices(service: The, user: Asking) -> Response:
    """List the devices and who holds their memory: predicted, measured, others', free."""
    board = service.scheduler.board()

    def made() -> str:
        names = {item.id: item.name for item in board.seen_by(user)}
        shown = [shown_device(use, names) for use in board.devices]
        return models.Devices(devices=shown, at=board.at).model_dump_json()

    text = await service.answers.get(board, ("devices", whose(user)), made)
    return Response(text, media_type="application/json")


async def require_room(service: The) -> None:
    """Answer 503 to more listeners than the server has room for."""
    if service.hub.num_listeners >= MAX_LISTENERS:
        raise HTTPException(503, "Too many listen already.", headers={"Retry-After": "10"})


@router.get("/events", response_class=EventSourceResponse, dependencies=[Depends(require_room)])
async def follow_events(service: The, user: Asking) -> AsyncIterator[ServerSentEvent]:
    """Stream what happens: `item`, `trial`, `queue`, `devices`; `missed` after a gap."""
    yield ServerSentEvent(event="hello", data={"user": user.name}, retry=3000)
    async for event in service.hub.listen(user):
        yield ServerSentEvent(event=event.kind, id=str(event.number), data=dict(event.data))


class _Figures(Collector):
    """The figures of one picture of the queue."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        board, now = self._service.scheduler.board(), time.time()
        states = GaugeMetricFamily("autosft_items", "Items in the queue by state.", labels=["state"])
        counts = Counter(item.state for item in board.items)
        for state in ItemState:
            if state not in (ItemState.DONE, ItemState.FAILED, ItemState.CANCELLED, ItemState.REFUSED):
                states.add_metric([state.value], counts[state])
        yield states
        ended = CounterMetricFamily(
            "autosft_items_ended", "Items that have ended, by how; of those shown.", labels=["outcome"]
        )
        for state in (ItemState.DONE, ItemState.FAILED, ItemState.CANCELLED, ItemState.REFUSED):
            ended.add_metric([state.value], counts[state])
        yield ended
        waits: dict[str, float] = {}
        for item in board.items:
            if item.is_queued:
                waits[item.owner] = max(waits.get(item.owner, 0.0), now - item.queued_at)
        longest = GaugeMetricFamily(
            "autosft_longest_wait_seconds", "How long a user's oldest item waits.", labels=["user"]
        )
        for owner, seconds in sorted(waits.items()):
            longest.add_metric([owner], seconds)
        yield longest
        yield from self._of_devices()
        yield GaugeMetricFamily(
            "autosft_listeners", "Open streams of events.", value=self._service.hub.num_listeners
        )
        yield GaugeMetricFamily(
            "autosft_planner_waiting",
            "Predictions not answered yet.",
            value=self._service.planner.num_waiting,
        )

    def _of_devices(self) -> Iterator[Metric]:
        labels = ["device", "name"]
        booked = GaugeMetricFamily("autosft_device_booked_bytes", "Booked by prediction.", labels=labels)
        measured = GaugeMetricFamily("autosft_device_measured_bytes", "Held by items.", labels=labels)
        others = GaugeMetricFamily("autosft_device_others_bytes", "Held by others.", labels=labels)
        free = GaugeMetricFamily("autosft_device_free_bytes", "Free.", labels=labels)
        items = GaugeMetricFamily("autosft_device_items", "Items on the device.", labels=labels)
        for use in self._service.scheduler.board().devices:
            name = [use.device.uuid, use.device.name]
            booked.add_metric(name, sum(num for _, num in use.booked))
            measured.add_metric(name, sum(num for _, num in use.measured))
            others.add_metric(name, use.others_bytes)
            free.add_metric(name, use.free_bytes)
            items.add_metric(name, len(use.booked))
        yield from (booked, measured, others, free, items)
