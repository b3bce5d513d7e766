"""Whether the disk has room for a study's checkpoints, before it starts and while it runs.

A study never fills its disk: trials start only if the next checkpoint of every running trial fits, workers
check again before they write one, and the study waits, with a notice, while there is no room.  Writes
`Loop.disk`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Sharding
from autosft.profiles.units import gib
from autosft.scheduler.loop.state import Loop
from autosft.studies.files.checkpoints import remove, trial_dir
from autosft.studies.files.study_folder import free_bytes
from autosft.studies.trial import ExecutionPlan

#: Reserve besides checkpoints: for logs, per-example losses and the database.
RESERVE_BYTES = 64 << 20


def checkpoint_bytes(plan: ExecutionPlan, method: Method) -> int:
    """Predict the size of a checkpoint with its resume state, from the memory in the plan, in bytes.

    Weights and optimizer state as they are in memory; for adapters, whose weights the estimate does not
    separate from the model's, half of the two moments.
    """
    components = dict(plan.estimate.components)
    optimizer_state = components.get("optimizer state", 0)
    is_whole = method in (Method.FULL, Method.SPARSE)
    weights = components.get("parameters", 0) if is_whole else optimizer_state // 2
    num_parts = plan.data_parallel if plan.sharding is Sharding.FSDP else 1
    return (weights + optimizer_state) * num_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDemand:
    """The predicted disk usage of a study's checkpoints."""

    checkpoint_bytes: int  # of one, including its resume state
    num_trials: int
    num_concurrent: int  # trials at once, if there are enough
    keep_best: int  # checkpoints kept over the entire study
    is_uploaded: bool  # to a URL: local only while being written or read

    @property
    def num_written(self) -> int:
        """Return the number of checkpoints of running trials: each has its last one and the next."""
        return 2 * min(self.num_trials, self.num_concurrent)

    @property
    def num_kept(self) -> int:
        """Return the number of checkpoints that exist at once, including the best ones that are kept.

        Trials paused at a rung keep one more each; if that is too much, the study waits.
        """
        return min(2 * self.keep_best, self.num_trials) + self.num_written


def check_before_start(
    demand: CheckpointDemand, folder: Path, *, disk_budget: int | None, kept_bytes: int
) -> None:
    """Check that the disk and --disk-budget are large enough for a study, as predicted.  Raises UserError.

    `kept_bytes`: size of what an earlier run of the study left in `folder`.
    """
    size = f"{gib(demand.checkpoint_bytes)} (predicted)"
    needed = demand.num_kept * demand.checkpoint_bytes
    what = f"{demand.num_kept} checkpoints of {size}"
    if disk_budget is not None and needed > disk_budget:
        raise UserError(
            f"--disk-budget {gib(disk_budget)}: this study keeps up to {what}, {gib(needed)}.",
            remedy=f"Allow {gib(needed)}, or keep fewer with --keep-best, or use --method lora.",
        )
    if demand.is_uploaded:
        needed = demand.num_written * demand.checkpoint_bytes
        what = f"{demand.num_written} checkpoints of {size} until they are uploaded"
    free = free_bytes(folder)
    missing = needed + RESERVE_BYTES - kept_bytes - free
    if missing > 0:
        raise UserError(
            f"The disk of {folder} has {gib(free)} free; this study keeps up to {what}.",
            remedy=f"Make {gib(missing)} of space, choose another disk with --output, or keep fewer "
            "checkpoints with --keep-best.",
        )


def disk_shortage(loop: Loop) -> str | None:
    """Return why no further trial may start for lack of disk space; None if there is room.

    Required is room for the next checkpoint of every running trial and of one more; after a worker found the
    disk full, also more than was free then.
    """
    run = loop.run
    next_bytes = (len(loop.attempts.running) + 1) * run.checkpoint_bytes
    needed = max(next_bytes + RESERVE_BYTES, loop.disk.needed_bytes)
    free = free_bytes(run.output_dir)
    if free < needed:
        return (
            f"Paused: the disk of {run.output_dir} has {gib(free)} free, the next checkpoints need "
            f"{gib(needed)}. The study continues once there is space; nothing is lost."
        )
    loop.disk.needed_bytes = 0
    used = sum(checkpoint.num_bytes for checkpoint in loop.records.checkpoints())
    if run.disk_budget is not None and used + next_bytes > run.disk_budget:
        return (
            f"Paused: the checkpoints of this study take {gib(used)} and the next ones {gib(next_bytes)}, "
            f"of --disk-budget {gib(run.disk_budget)}."
        )
    return None


def handle_full_disk(loop: Loop, trial: int) -> None:
    """Remove what a worker was writing when the disk was full, and wait for more space."""
    folder: Path = trial_dir(loop.run.output_dir, trial)
    for staged in folder.glob("staging-*"):
        remove(staged)
    room = max(loop.run.checkpoint_bytes, RESERVE_BYTES)
    loop.disk.needed_bytes = max(loop.disk.needed_bytes, free_bytes(folder) + room)
