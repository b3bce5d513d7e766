"""The running attempts: when each ends, and the load of its devices.

Writes `Loop.attempts`.
"""

from __future__ import annotations

from collections.abc import Collection

from autosft.scheduler.loop.fleet import is_split_by_cores
from autosft.scheduler.loop.state import Loop, RunningAttempt
from autosft.studies.trial import Measurement, StopReason


def add_attempt(loop: Loop, attempt: RunningAttempt) -> None:
    """Add an attempt that starts now to the running ones."""
    job = attempt.job
    add_up_load(loop, job.device_uuids)
    attempt.load_since = loop.runner.now()
    loop.attempts.running[job.trial] = attempt
    loop.idle.taken((job.trial, job.attempt), job.device_uuids)


def remove_attempt(loop: Loop, attempt: RunningAttempt) -> None:
    """Remove an attempt that has ended, freeing its devices."""
    job = attempt.job
    add_up_load(loop, job.device_uuids)
    del loop.attempts.running[job.trial]
    for lease in attempt.leases:
        lease.release()
    busy = {uuid for other in loop.attempts.running.values() for uuid in other.job.device_uuids}
    loop.idle.abandoned((job.trial, job.attempt))
    freed = [uuid for uuid in job.device_uuids if uuid not in busy or is_split_by_cores(loop, uuid)]
    loop.idle.freed(freed, now=loop.runner.now())


def release_devices(loop: Loop) -> None:
    """Give back the devices of all attempts, when the study ends with an error; its runner is closed next."""
    for attempt in loop.attempts.running.values():
        for lease in attempt.leases:
            lease.release()


def request_stop(loop: Loop, attempt: RunningAttempt, reason: StopReason) -> None:
    """Ask a running attempt to stop, at most once."""
    if attempt.stop_reason is None:
        attempt.stop_reason = reason
        loop.runner.stop(attempt.job.trial, attempt.job.attempt, reason)


def note_slowdown(attempt: RunningAttempt, measurement: Measurement) -> None:
    """Keep by how much other programs have slowed an attempt's steps, where it reported that."""
    if measurement.slowdown is not None:
        attempt.slowdowns.append(measurement.slowdown)


def update_predicted_end(loop: Loop, attempt: RunningAttempt, measurement: Measurement) -> None:
    """Correct the predicted end of an attempt by its speed so far."""
    now = loop.runner.now()
    if attempt.first_report is None:
        attempt.first_report = measurement.step, measurement.elapsed_s
        key = measurement.trial, measurement.attempt
        loop.idle.stepped(key, first_step_at=now - measurement.elapsed_s)
    first_step, first_elapsed_s = attempt.first_report
    if measurement.remaining_s is not None:
        attempt.ends_at = now + measurement.remaining_s
    elif measurement.step > first_step:
        step_s = (measurement.elapsed_s - first_elapsed_s) / (measurement.step - first_step)
        attempt.ends_at = now + (measurement.num_steps - measurement.step) * step_s


def add_up_load(loop: Loop, device_uuids: Collection[str]) -> None:
    """Integrate the load of devices up to now, for each of their attempts.

    Called before an attempt starts or ends on these devices.
    """
    now = loop.runner.now()
    sharing = [
        attempt
        for attempt in loop.attempts.running.values()
        if not set(device_uuids).isdisjoint(attempt.job.device_uuids)
    ]
    load = sum(attempt.option.load for attempt in sharing)
    for attempt in sharing:
        attempt.load_integral_s += load * (now - attempt.load_since)
        attempt.load_s += now - attempt.load_since
        attempt.load_since = now
