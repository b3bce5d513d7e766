"""What the admin of a server has asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autosft.service.decide.situation import Policy
from autosft.service.requests.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is served, where, and what requests may name."""

    storage: str
    folder: Path  # of the server: logs of items, configurations, its planner's log
    limits: Limits
    host: str = "127.0.0.1"
    port: int = 8090
    host_names: tuple[str, ...] = ()  # by which others reach it, such as behind a proxy
    hardware: str = "auto"
    gpus: str | None = None
    address: str | None = None  # of a Ray cluster that this machine is a node of
    is_behind_tls: bool = False
    policy: Policy = field(default_factory=Policy)

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def items_folder(self) -> Path:
        """Where each item's drivers have their log."""
        return self.folder / "items"

    @property
    def nodes_file(self) -> Path:
        """Where the devices of a cluster's other nodes are written as they come and go."""
        return self.folder / "nodes.json"

    def hosts(self) -> frozenset[str]:
        """Return what a request's Host may be."""
        here = {self.host, *(LOOPBACK if self.is_loopback else ())}
        return frozenset(
            name
            for host in here | set(self.host_names)
            for bare in [f"[{host}]" if ":" in host and not host.startswith("[") else host]
            for name in (bare, f"{bare}:{self.port}")
        )

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"
