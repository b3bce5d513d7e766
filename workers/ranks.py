"""The processes of one attempt on several devices: who they are and what they agree on.

One process a device, all started as one attempt and ended as one.  They find each other through a file in
the attempt's folder, which every node that takes part has to see anyway for the checkpoints: no port is
chosen, so none can be taken.  What they say beside gradients and parameters travels over gloo, on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autosft.studies.trial import StopReason, TrialJob
from autosft.workers.device import TrialDevice

if TYPE_CHECKING:
    import torch

# The slowest thing that ranks wait for is rank 0 hashing a large checkpoint, or uploading it.  A process that
# is gone is seen at once, and one that hangs by the attempt's own limit (`follow.hang_limit_s`), long before.
COLLECTIVE_TIMEOUT_S = 4 * 3600.0

# By these accelerate would take a process for a rank of whatever autosft itself was started with.
_LAUNCHER_VARIABLES = (
    *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    *(f"{launcher}_{name}" for launcher in ("MV2_COMM_WORLD", "PMI") for name in ("RANK", "SIZE")),
)

# In the order of precedence, should ranks be told different things at the same step.
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
    ranks_here: tuple[int, ...]  # those of this node, in order

    @property
    def local_rank(self) -> int:
        return self.ranks_here.index(self.rank)


def staging_dir(job: TrialJob) -> Path:
    """Return the folder for what an attempt needs only while it runs; of a killed one it is tidied away."""
    return Path(job.output_dir) / f"staging-{job.attempt}"


def seat_environment(job: TrialJob, seat: Seat) -> dict[str, str | None]:
    """Return the variables by which accelerate and transformers know a rank; None for those to remove.

    A single process must not find any of them, also where autosft itself was started by a launcher.
    """
    several = len(job.device_uuids) > 1
    return {
        "RANK": str(seat.rank) if several else None,
        "WORLD_SIZE": str(len(job.device_uuids)) if several else None,
        "LOCAL_RANK": str(seat.local_rank) if several else None,
        "LOCAL_WORLD_SIZE": str(len(seat.ranks_here)) if several else None,
        # accelerate insists on one when there are several nodes; the ranks have met by then (`join`).
        "MASTER_ADDR": "127.0.0.1" if several else None,
        "MASTER_PORT": None,
        **dict.fromkeys(_LAUNCHER_VARIABLES),
    }


class Gang(Protocol):
    """What the ranks of an attempt do together.  Every method is called by all of them at the same point."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, reason: StopReason | None) -> StopReason | None:
        """Return why all of them stop now, when any of them has been told to."""
        ...

    def maximum(self, counts: Sequence[int | None]) -> list[int | None]:
        """Return the largest of each count over the ranks; None where no rank has one."""
        ...

    def total(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the sums of equally long rows over the ranks, in double precision."""
        ...

    def wait(self) -> None:
        """Wait until all of them are here."""
        ...


class Alone:
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
    """A gang over torch.distributed's default process group, which has gloo for tensors on the CPU."""

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
    """Meet the other ranks of the attempt and return what they are to each other.

    Which rank this process is stands in its environment (`seat_environment`).
    """
    if len(job.device_uuids) == 1:
        return Alone()
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
