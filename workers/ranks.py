"""Coordinate the processes (ranks) of one attempt on several devices.

There is one process per device; they start and end together.  They rendezvous through a file in the attempt's
folder, which all nodes have to see anyway for the checkpoints, so that no port has to be chosen.  Besides
gradients and parameters, they communicate over gloo, on the CPU; on one machine over its loopback interface.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autosft.profiles.hardware.local_sockets import local_only
from autosft.studies.trial import StopReason, TrialJob
from autosft.workers.device import TrialDevice

if TYPE_CHECKING:
    import torch

# The longest that ranks wait for is rank 0 hashing or uploading a large checkpoint.  A dead process is
# noticed at once, and a hung one by the attempt's own limit (`attempt_monitor.hang_limit_s`), long before.
COLLECTIVE_TIMEOUT_S = 4 * 3600.0

# With these, accelerate would take a process for a rank of the launcher that started autosft.
_LAUNCHER_VARIABLES = (
    *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    *(f"{launcher}_{name}" for launcher in ("MV2_COMM_WORLD", "PMI") for name in ("RANK", "SIZE")),
)

# In order of precedence, in case ranks get different reasons at the same step.
_STOP_REASONS = (
    None,
    StopReason.SHUTDOWN,
    StopReason.PAUSED,
    StopReason.RUNG,
    StopReason.BUDGET,
    StopReason.TARGET,
    StopReason.PRUNED,
    StopReason.USER,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A process's place in the gang of its attempt; rank r trains on `job.device_uuids[r]`."""

    rank: int
    ranks_here: tuple[int, ...]  # the ranks on this node, in order

    @property
    def local_rank(self) -> int:
        return self.ranks_here.index(self.rank)


def staging_dir(job: TrialJob) -> Path:
    """Return the folder for an attempt's temporary files; the next attempt deletes a killed one's."""
    return Path(job.output_dir) / f"staging-{job.attempt}"


def seat_environment(job: TrialJob, seat: Seat) -> dict[str, str | None]:
    """Return the variables that define a rank for accelerate and transformers; None for those to remove.

    A single process must not see any of them, even if a launcher started autosft itself.
    """
    several = len(job.device_uuids) > 1
    is_here = several and len(seat.ranks_here) == len(job.device_uuids)
    return {
        **(local_only() if is_here else {}),
        "RANK": str(seat.rank) if several else None,
        "WORLD_SIZE": str(len(job.device_uuids)) if several else None,
        "LOCAL_RANK": str(seat.local_rank) if several else None,
        "LOCAL_WORLD_SIZE": str(len(seat.ranks_here)) if several else None,
        # accelerate requires one for several nodes; the ranks have joined by then (`join`).
        "MASTER_ADDR": "127.0.0.1" if several else None,
        "MASTER_PORT": None,
        **dict.fromkeys(_LAUNCHER_VARIABLES),
    }


class Gang(Protocol):
    """Collective operations of an attempt's ranks.  All ranks call each method at the same point."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, reason: StopReason | None) -> StopReason | None:
        """Return why all ranks stop now, None unless any of them has been asked to."""
        ...

    def maximum(self, counts: Sequence[int | None]) -> list[int | None]:
        """Return the maximum of each count over the ranks; None where no rank has one."""
        ...

    def total(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the sums of equally long rows over the ranks, in double precision."""
        ...

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        ...


class SingleProcess:
    """A gang of one."""

    rank = 0
    size = 1

    def agree(self, reason: StopReason | None) -> StopReason | None:
        return reason

    def maximum(self, counts: Sequence[int | None]) -> list[int | None]:
        return list(counts)

    def total(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        return [list(row) for row in rows]

    def wait(self) -> None:
        return


class ProcessGroup:
    """A gang over torch.distributed's default process group, with gloo for tensors on the CPU."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def agree(self, reason: StopReason | None) -> StopReason | None:
        [index] = self.maximum([_STOP_REASONS.index(reason)])
        assert index is not None
        return _STOP_REASONS[index]

    def maximum(self, counts: Sequence[int | None]) -> list[int | None]:
        import torch

        largest = torch.tensor([-1 if count is None else count for count in counts])
        self._reduce(largest, "MAX")
        return [None if count < 0 else count for count in largest.tolist()]

    def total(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        import torch

        sums = torch.tensor(rows, dtype=torch.float64)
        self._reduce(sums, "SUM")
        totals: list[list[float]] = sums.tolist()
        return totals

    def wait(self) -> None:
        self.maximum([0])

    def _reduce(self, tensor: torch.Tensor, how: str) -> None:
        import torch.distributed as dist

        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how))


def join(job: TrialJob, device: TrialDevice) -> Gang:
    """Join the other ranks of the attempt and return their gang.

    The environment determines this process's rank (`seat_environment`).
    """
    if len(job.device_uuids) == 1:
        return SingleProcess()
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore  # torch.distributed does not list it

    device.select(int(os.environ["LOCAL_RANK"]))
    path = staging_dir(job) / "rendezvous"
    path.parent.mkdir(parents=True, exist_ok=True)
    dist.init_process_group(
        backend=device.collective_backend,
        store=FileStore(str(path), len(job.device_uuids)),
        rank=int(os.environ["RANK"]),
        world_size=len(job.device_uuids),
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return ProcessGroup()
