"""Whether the disk has room for the checkpoints of a study, before it starts and while it runs.

A study never fills its disk: trials start only where the next checkpoint of every running one fits, workers
look again before they write one, and where there is no room the study waits and says so.
"""

from __future__ import annotations

from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Sharding
from autosft.profiles.units import gib
from autosft.scheduler.loop.state import Loop
from autosft.scheduler.study_run import StudyRun
from autosft.studies.files.checkpoints import remove, trial_dir
from autosft.studies.files.study_folder import free_bytes
from autosft.studies.trial import ExecutionPlan

#: Left free beside checkpoints: for logs, losses per example and the database.
RESERVE_BYTES = 64 << 20


def checkpoint_bytes(plan: ExecutionPlan, method: Method) -> int:
    """Predict the size of a checkpoint with its resume state, from what the plan holds in memory.

    Weights and optimizer state as they are in memory; of adapters, whose weights are not told apart from
    the model's, half of their two moments.
    """
    components = dict(plan.estimate.components)
    optimizer_state = components.get("optimizer state", 0)
    is_whole = method in (Method.FULL, Method.SPARSE)
    weights = components.get("parameters", 0) if is_whole else optimizer_state // 2
    num_parts = plan.data_parallel if plan.sharding is Sharding.FSDP else 1
    return (weights + optimizer_state) * num_parts


def check_before_start(run: StudyRun, *, kept_bytes: int) -> None:
    """Refuse a study that its disk or its budget is predicted to be too small for.

    Predicted: the best of the whole study and of the trials that are over, and for each running trial its
    last checkpoint and the one being written.  `kept_bytes`: what an earlier run has left of it.  Trials
    that pause at a rung keep one more each, where that is too much the study waits.
    """
    num_running = min(run.num_trials, sum(one.num_slots for one in run.slots))
    num_kept = min(2 * run.keep_best, run.num_trials) + 2 * num_running
    needed = num_kept * run.checkpoint_bytes
    what = f"{num_kept} checkpoints of {gib(run.checkpoint_bytes)} (predicted)"
    if run.disk_budget is not None and needed > run.disk_budget:
        raise UserError(
            f"--disk-budget {gib(run.disk_budget)}: this study keeps up to {what}, {gib(needed)}.",
            remedy=f"Allow {gib(needed)}, or keep fewer with --keep-best, or use --method lora.",
        )
    if run.store_url is not None:  # here only while they are written, and read again
        num_kept = 2 * num_running
        needed = num_kept * run.checkpoint_bytes
        what = f"{num_kept} checkpoints of {gib(run.checkpoint_bytes)} (predicted) until they are uploaded"
    free = free_bytes(run.output_dir)
    missing = needed + RESERVE_BYTES - kept_bytes - free
    if missing > 0:
        raise UserError(
            f"The disk of {run.output_dir} has {gib(free)} free; this study keeps up to {what}.",
            remedy=f"Make {gib(missing)} of space, choose another disk with --output, or keep fewer "
            "checkpoints with --keep-best.",
        )


def why_no_room(loop: Loop) -> str | None:
    """Say why no further trial may start for want of disk; None where there is room.

    Needed are the next checkpoint of every running trial and of one more; after a disk was found full, also
    more than was free then.
    """
    run = loop.run
    next_bytes = (len(loop.running) + 1) * run.checkpoint_bytes
    needed = max(next_bytes + RESERVE_BYTES, loop.disk_needed_bytes)
    free = free_bytes(run.output_dir)
    if free < needed:
        return (
            f"Paused: the disk of {run.output_dir} has {gib(free)} free, the next checkpoints need "
            f"{gib(needed)}. Make space and the study goes on; nothing is lost."
        )
    loop.disk_needed_bytes = 0
    used = sum(one.num_bytes for one in loop.records.checkpoints())
    if run.disk_budget is not None and used + next_bytes > run.disk_budget:
        return (
            f"Paused: the checkpoints of this study take {gib(used)} and the next ones {gib(next_bytes)}, "
            f"of --disk-budget {gib(run.disk_budget)}."
        )
    return None


def found_full(loop: Loop, trial: int) -> None:
    """Take up that a worker found the disk full: clear what it had begun to write, wait for more space."""
    folder: Path = trial_dir(loop.run.output_dir, trial)
    for staged in folder.glob("staging-*"):
        remove(staged)
    room = max(loop.run.checkpoint_bytes, RESERVE_BYTES)
    loop.disk_needed_bytes = max(loop.disk_needed_bytes, free_bytes(folder) + room)
