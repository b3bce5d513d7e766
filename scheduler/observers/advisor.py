"""Watches a study's events for signs of trouble; advice is reported and recorded once per cause."""

from __future__ import annotations

from collections.abc import Callable

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.scheduler.events import (
    AdviceGiven,
    Observer,
    StudyEvent,
    TrialEnded,
    TrialMeasured,
    TrialStarted,
)
from autosft.studies.advice import Advice, Cause, memory_taken, watch
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import Measurement, TrialRecord

#: How often the devices are checked.
LOOK_EVERY_S = 30.0


class Advisor:
    """An observer that forwards events and adds advice."""

    def __init__(
        self,
        records: StudyRecords,
        observe: Observer,
        *,
        cluster: ClusterProfile,
        refresh: Callable[[ClusterProfile], ClusterProfile],
        now: Callable[[], float],
    ) -> None:
        """`cluster` is the state before the first trial; `refresh` reads it again; `now` in UNIX seconds."""
        self._records, self._observe = records, observe
        self._before, self._refresh, self._now = cluster, refresh, now
        self._looked_at = now()
        self._running: dict[int, TrialRecord] = {}
        self._reports: dict[int, list[Measurement]] = {}
        self._told = {key(entry) for entry in records.advice()}

    def __call__(self, event: StudyEvent) -> None:
        self._observe(event)
        match event:
            case TrialStarted(record=record):
                self._running[record.number] = record
                self._reports[record.number] = []
            case TrialEnded(record=record):
                self._running.pop(record.number, None)
                self._reports.pop(record.number, None)
            case TrialMeasured(measurement=measurement):
                self._measured(measurement)

    def _measured(self, measurement: Measurement) -> None:
        reports = self._reports.setdefault(measurement.trial, [])
        reports.append(measurement)
        record = self._running.get(measurement.trial)
        limit = 1.0 if record is None else record.settings.max_grad_norm
        for advice in watch(reports, max_grad_norm=limit):
            self._tell(advice)
        if self._now() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = self._now()
            self._look(measurement)

    def _look(self, measurement: Measurement) -> None:
        """Check whether another program has taken memory of a GPU; free RAM fluctuates by itself."""
        before = {device.uuid: device for device in self._before.devices if device.kind.traits.has_own_memory}
        if not before or (Cause.MEMORY_TAKEN, None) in self._told:
            return
        for device in self._refresh(self._before).devices:
            if device.uuid in before:
                message = memory_taken(
                    free_before_bytes=before[device.uuid].free_bytes,
                    promised_bytes=self._promised_bytes(device),
                    free_bytes=device.free_bytes,
                    holders=", ".join(
                        process.name
                        for process in device.processes
                        if process not in before[device.uuid].processes
                    ),
                )
                if message:
                    self._tell(
                        Advice(
                            trial=measurement.trial,
                            step=measurement.step,
                            cause=Cause.MEMORY_TAKEN,
                            message=f"GPU {device.index}: {message}",
                        )
                    )

    def _promised_bytes(self, device: DeviceProfile) -> int:
        """Return the bytes that running trials may use on a device or any of the same name: never too few."""
        plans = [
            running_trial.plan for running_trial in self._running.values() if running_trial.plan is not None
        ]
        return sum(plan.booked_bytes for plan in plans if plan.device_name == device.name)

    def _tell(self, advice: Advice) -> None:
        if key(advice) in self._told:
            return
        self._told.add(key(advice))
        self._records.add_advice(advice, now=self._now())
        self._observe(AdviceGiven(trial=advice.trial, cause=advice.cause.value, message=advice.message))


def key(advice: Advice) -> tuple[Cause, int | None]:
    """Return the key by which advice is reported once: per study if about the machine, else per trial."""
    return advice.cause, None if advice.cause.is_of_machine else advice.trial


__all__ = ["LOOK_EVERY_S", "Advisor", "key"]
