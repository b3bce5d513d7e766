"""The devices of a cluster follow its nodes, and files have to be the same ones everywhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.known_devices import cluster_from_name
from autosft.scheduler.cluster.nodes import NodeDevices, require_everywhere
from autosft.scheduler.setup.folders import require_shared
from autosft.scheduler.setup.inputs import chosen_anywhere
from autosft.studies.request import TuneRequest


class FakeNodes:
    """Nodes that bring what `bring` says, as soon as they are asked unless they are `slow`."""

    def __init__(self, **bring: ClusterProfile) -> None:
        self.bring = bring
        self.slow: set[str] = set()
        self.asked: list[str] = []
        self.unseen: dict[str, str] = {}  # what a node lacks: paths below this one
        self.pending: dict[str, Future[Any]] = {}

    def other_nodes(self) -> dict[str, str]:
        return {node: f"host-{node}" for node in self.bring}

    def on_node(self, node: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.asked.append(node)
        answer: Future[Any] = Future()
        if function.__name__ == "missing_here":
            below = self.unseen.get(node, "nowhere")
            answer.set_result([path for path in arguments[0] if path.startswith(below)])
        elif node in self.slow:
            self.pending[node] = answer
        else:
            answer.set_result(self.bring[node])
        return answer


def cards(spec: str, *uuids: str) -> ClusterProfile:
    made = cluster_from_name(spec)
    devices = [replace(made.devices[0], uuid=uuid, is_assumed=False) for uuid in uuids]
    return replace(made, devices=tuple(devices))


HERE = cards("L40S", "GPU-here")


def uuids(devices: NodeDevices) -> list[str]:
    return [device.uuid for device in devices.devices().devices]


def test_devices_come_and_go_with_their_nodes() -> None:
    nodes = FakeNodes(a=cards("A100-80GB", "GPU-a0", "GPU-a1"))
    devices = NodeDevices(nodes, HERE, poll_s=1e9)
    assert uuids(devices) == ["GPU-here", "GPU-a0", "GPU-a1"]
    assert devices.node_of == {"GPU-a0": "a", "GPU-a1": "a"}
    nodes.bring["b"] = cards("A100-80GB", "GPU-b0")
    devices.look(timeout_s=0)
    assert uuids(devices) == ["GPU-here", "GPU-a0", "GPU-a1", "GPU-b0"]
    del nodes.bring["a"]
    devices.look(timeout_s=0)
    assert uuids(devices) == ["GPU-here", "GPU-b0"]
    assert devices.node_of["GPU-a0"] == "a", "an attempt may still run there"
    assert sorted(nodes.asked) == ["a", "b"], "a node is asked once"
    devices.close()


def test_a_node_that_has_died_is_not_offered_again() -> None:
    """The runner says so before the end of what ran there: sooner than the next look would be."""
    nodes = FakeNodes(a=cards("L40S", "GPU-a"))
    devices = NodeDevices(nodes, HERE, poll_s=1e9)
    del nodes.bring["a"]
    assert uuids(devices) == ["GPU-here", "GPU-a"]
    devices.look_again()
    assert uuids(devices) == ["GPU-here"]
    devices.close()


def test_a_slow_node_is_not_waited_for() -> None:
    nodes = FakeNodes()
    devices = NodeDevices(nodes, HERE, poll_s=1e9)
    nodes.slow = {"a"}
    nodes.bring["a"] = cards("A100-80GB", "GPU-a0")
    devices.look(timeout_s=0)
    assert uuids(devices) == ["GPU-here"]
    nodes.pending["a"].set_result(nodes.bring["a"])
    devices.look(timeout_s=0)
    assert uuids(devices) == ["GPU-here", "GPU-a0"]
    devices.close()


def test_a_node_that_dies_while_it_is_asked_brings_nothing() -> None:
    nodes = FakeNodes()
    devices = NodeDevices(nodes, HERE, poll_s=1e9)
    nodes.slow = {"a"}
    nodes.bring["a"] = HERE
    devices.look(timeout_s=0)
    nodes.pending["a"].set_exception(RuntimeError("the node is gone"))
    devices.look(timeout_s=0)
    assert uuids(devices) == ["GPU-here"]
    devices.close()


def test_two_raylets_of_one_machine_bring_its_devices_once_and_are_two_nodes_for_gangs() -> None:
    nodes = FakeNodes(a=cards("L40S", "GPU-here", "GPU-a"), b=cards("L40S", "GPU-here", "GPU-b"))
    devices = NodeDevices(nodes, HERE, poll_s=1e9)
    assert uuids(devices) == ["GPU-here", "GPU-a", "GPU-b"]
    assert len({device.node for device in devices.devices().devices}) == 3
    devices.close()


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        ("GPU-a0", ["GPU-a0"]),
        ("gpu-a1,GPU-here", ["GPU-here", "GPU-a1"]),
        ("GPU-nowhere", []),
    ],
)
def test_devices_are_chosen_by_uuid_on_every_node(gpus: str, found: list[str]) -> None:
    nodes = FakeNodes(a=cards("L40S", "GPU-a0", "GPU-a1"))
    chosen = chosen_anywhere(TuneRequest(address="head:6379", gpus=gpus))
    assert chosen is not None
    devices = NodeDevices(nodes, HERE, is_asked=chosen, poll_s=1e9)
    assert uuids(devices) == found
    nodes.bring["b"] = cards("L40S", "GPU-b0")  # one that joins is not taken either
    devices.look(timeout_s=0)
    assert uuids(devices) == found
    devices.close()


@pytest.mark.parametrize("request_", [{"gpus": "GPU-a"}, {"gpus": "0,1", "address": "head:6379"}, {}])
def test_without_an_address_or_by_index_devices_are_this_machines(request_: dict[str, str]) -> None:
    assert chosen_anywhere(TuneRequest(**request_)) is None


def test_a_folder_that_another_node_has_not_is_refused(tmp_path: Path) -> None:
    local, shared = tmp_path / "local", tmp_path / "shared"
    local.mkdir()
    shared.mkdir()
    nodes = FakeNodes(a=HERE, b=HERE)
    nodes.unseen = {"b": str(local)}
    require_everywhere(nodes, {"--output": shared}, remedy="Share it.")
    with pytest.raises(UserError, match=r"--output .*local: node host-b of the cluster does not have it"):
        require_everywhere(nodes, {"--data": shared, "--output": local}, remedy="Share it.")
    assert list(local.iterdir()) == [], "a probe is left"
    assert list(shared.iterdir()) == []


def test_a_cluster_of_one_node_needs_nothing_shared(tmp_path: Path) -> None:
    require_everywhere(FakeNodes(), {"--output": tmp_path / "missing"}, remedy="")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        (
            "sqlite:///{folder}/mine/studies.db",
            "--storage .*mine: node host-a of the cluster does not",
        ),
        ("postgresql://me@database/studies", None),
    ],
)
def test_a_database_in_a_folder_of_this_machine_is_refused_on_a_cluster(
    storage: str, words: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="psycopg, PostgreSQL's driver, is missing")
    for name in ("mine", "shared"):
        (tmp_path / name).mkdir()
    nodes = FakeNodes(a=HERE)
    nodes.unseen = {"a": str(tmp_path / "mine")}
    shared = tmp_path / "shared"
    given: dict[str, Any] = {"output": shared, "data": SimpleNamespace(path=shared)}
    cluster: Any = nodes
    if words is None:
        require_shared(cluster, storage.format(folder=tmp_path), TuneRequest(), **given)
        return
    with pytest.raises(UserError, match=words) as refusal:
        require_shared(cluster, storage.format(folder=tmp_path), TuneRequest(), **given)
    assert "postgresql://" in str(refusal.value.remedy)
