"""Asks the nodes of the Ray cluster that this process has joined."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Onlooker:
    """A cluster whose nodes are asked and on which no trial runs; valid inside `look_at`."""

    def other_nodes(self) -> dict[str, str]:
        """Return the names of the other live nodes, by Ray's node id."""
        return alive_nodes()[0]

    def on_node(self, node: str, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Run a function on a node."""
        return run_on(node, function, *arguments)


def alive_nodes() -> tuple[dict[str, str], bool]:
    """Return the names of the other live nodes by Ray's id, and whether this machine's is alive."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    return alive, alive.pop(here, None) is not None


def run_on(node: str, function: Callable[..., Any], *arguments: object) -> Future[Any]:
    """Run a function on a node, beside whatever runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy=there)
    answer: Future[Any] = task.remote(*arguments).future()
    return answer
