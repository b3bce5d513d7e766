"""Runs evaluations of models beside trials: each in a process of its own, leased and capped like training.

What is evaluated and what becomes of the scores is the business of `final_evaluation` and `untuned_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.recipe import Method, Sharding
from autosft.profiles.units import duration, gib
from autosft.scheduler.events import Note, Observer, Waiting
from autosft.scheduler.study_run import Lease, Slots
from autosft.studies.trial import AttemptEnd, ExecutionPlan, Measurement, StopReason, TrialJob

if TYPE_CHECKING:
    from autosft.scheduler.setup.open_study import OpenStudy

POLL_S = 0.1
PROGRESS_S = 15.0
#: How long programs that are none of ours are waited for: nothing says when they end.
MAX_WAIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation as a job, on no device yet: planned for one device, of which it leases what it books."""

    job: TrialJob
    name: str  # for the user: "trial 3 step 20"
    keep: Callable[[Measurement], None]  # called once with its metrics
    skipped: str  # what its absence is called: "Not evaluated again"
    after: str  # what is said while it waits for a device: "The best checkpoints are evaluated after that."


@dataclass(slots=True)
class Queue:
    """Evaluations that are waiting and running.  Changed in place."""

    study: OpenStudy
    observe: Observer
    waiting: list[Evaluation]
    told_at: float
    waiting_since: float | None = None  # for a device that others hold
    running: dict[tuple[int, int], tuple[Evaluation, str, Lease]] = field(default_factory=dict)  # on a UUID


def run_evaluations(
    study: OpenStudy,
    evaluations: Sequence[Evaluation],
    *,
    observe: Observer,
    stop_requested: Callable[[], bool],
) -> None:
    """Run evaluations on free devices of the study, until they are done or the user wants to leave.

    What cannot be evaluated is reported and left out.
    """
    queue = Queue(study=study, observe=observe, waiting=list(evaluations), told_at=study.runner.now())
    is_stopping = False
    while queue.running or (queue.waiting and not is_stopping):
        if stop_requested() and not is_stopping:
            is_stopping = True
            for trial, attempt in queue.running:
                study.runner.stop(trial, attempt, StopReason.USER)
        if not is_stopping:
            start(queue)
        for event in study.runner.events(POLL_S):
            handle(queue, event)
        study.records.heartbeat(now=study.runner.now())


def start(queue: Queue) -> None:
    """Start waiting evaluations on free devices; where there are none at all, skip them and say why."""
    study = queue.study
    while queue.waiting:
        evaluation = queue.waiting[0]
        job = evaluation.job
        slots = free_slots(queue, job)
        if slots is None:
            if not queue.running:
                skip_waiting(queue, f"no device of the study is a {job.plan.device_name}")
            return
        lease = study.leases.acquire(
            slots.device,
            job.plan.booked_bytes,
            num_threads=job.plan.num_threads,
            study=job.study,
            trial=job.trial,
            until=study.runner.now() + 60.0,
        )
        if lease is None:
            if queue.running:
                return
            if make_do(queue, slots.device):
                continue
            wait_or_skip(queue, slots.device)
            return
        queue.waiting_since = None
        queue.waiting.pop(0)
        queue.running[job.trial, job.attempt] = evaluation, slots.device.uuid, lease
        study.runner.run(replace(job, device_uuids=(slots.device.uuid,)))


def free_slots(queue: Queue, job: TrialJob) -> Slots | None:
    """Return a device like the one that the job is planned for, with a free slot; None without one."""

    def num_used(slots: Slots) -> int:
        return sum(slots.device.uuid == uuid for _, uuid, _ in queue.running.values())

    alike = [slots for slots in queue.study.run.slots if slots.device.name == job.plan.device_name]
    return next((slots for slots in alike if num_used(slots) < slots.num_slots), None)


def on_one_device(plan: ExecutionPlan) -> ExecutionPlan:
    """Return a trial's plan for one device alone, which holds what the shards of all ranks took."""
    num_parts = plan.data_parallel if plan.sharding is Sharding.FSDP else 1
    alone = replace(plan, data_parallel=1, sharding=Sharding.NONE)
    return booking(alone, plan.booked_bytes * num_parts)


def booking(plan: ExecutionPlan, num_bytes: int) -> ExecutionPlan:
    """Return a plan capped so that it books so many bytes of its device."""
    return replace(plan, memory_cap_bytes=num_bytes - plan.estimate.outside_bytes)


def make_do(queue: Queue, device: DeviceProfile) -> bool:
    """Use less of a device, or skip and say why, where it never has what is booked; return whether so.

    What is booked was taken by training, in which evaluating needs only a part of it: to be tried where the
    weights fit.
    """
    evaluation, study = queue.waiting[0], queue.study
    plan = evaluation.job.plan
    most = min(study.leases.most_bytes(device), usable_bytes(device))
    if plan.booked_bytes <= most:
        return False
    weights = study.model.num_parameters * study.run.pinned.precision.weight_bytes
    if evaluation.job.settings.method is Method.QLORA:
        weights //= 4
    if weights + plan.estimate.outside_bytes >= most:
        skip_waiting(
            queue,
            f"It is done on one device, which has to hold the {gib(weights)} of the whole model's weights; "
            f"{device.name} has {gib(most)} for it.",
        )
    else:
        job = replace(evaluation.job, plan=booking(plan, most))
        queue.waiting[0] = replace(evaluation, job=job)
    return True


def wait_or_skip(queue: Queue, device: DeviceProfile) -> None:
    """Wait for a device, saying for whom; skip what waits for other programs that do not leave it."""
    leases, now = queue.study.leases, queue.study.runner.now()
    holders = leases.holders(device)
    if queue.waiting_since is None:
        queue.waiting_since = now
        queue.observe(Waiting(message=f"{holders} {queue.waiting[0].after}"))
    if now - queue.waiting_since > MAX_WAIT_S and not leases.are_held(device):
        skip_waiting(queue, f"{holders} That was waited for {duration(MAX_WAIT_S)}.")


def skip_waiting(queue: Queue, why: str) -> None:
    skipped = queue.waiting[0].skipped
    names = [evaluation.name for evaluation in queue.waiting]
    queue.waiting.clear()
    queue.observe(Note(message=f"{skipped}: {', '.join(names)}. {why}"))


def handle(queue: Queue, event: Measurement | AttemptEnd) -> None:
    """Keep a score, report progress, or free the device of an evaluation that has ended."""
    key = event.trial, event.attempt
    if key not in queue.running:
        return  # a late report of a trial
    evaluation, _, lease = queue.running[key]
    if isinstance(event, AttemptEnd):
        del queue.running[key]
        lease.release()
        if event.failure is not None:
            queue.observe(Note(message=f"{evaluation.skipped}: {evaluation.name}. {event.message}"))
        return
    if event.metrics:
        evaluation.keep(event)
    elif queue.study.runner.now() - queue.told_at >= PROGRESS_S:
        queue.told_at = queue.study.runner.now()
        share = event.step / event.num_steps
        queue.observe(Note(message=f"{evaluation.name}: {share:.0%} evaluated"))
