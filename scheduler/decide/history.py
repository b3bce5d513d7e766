"""What earlier trials have measured, for the models of memory and speed."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from autosft.profiles.memory.calibration import Calibration, row_of
from autosft.profiles.speed.measured import KindOfRun, MeasuredSpeeds, SpeedRow
from autosft.studies.store.database import parse_url
from autosft.studies.store.records import open_records
from autosft.studies.values import MemoryObservation


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Everything that earlier trials have taught."""

    memory: Calibration = field(default_factory=Calibration)
    speed: MeasuredSpeeds = field(default_factory=MeasuredSpeeds)


NOTHING_LEARNED = Learned()


def learned_so_far(url: str) -> Learned:
    """Return what earlier trials of all studies in a database have measured; makes no database.

    Raises UserError for a database that cannot be used, before minutes are spent.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        return Learned()
    with closing(open_records(url)) as records:
        observations = records.memory_observations()
    peaks = [
        row_of(one.plan.estimate, one.measured_allocated_bytes, out_of_memory=one.out_of_memory)
        for one in observations
    ]
    speeds = [speed_row(one) for one in observations]
    return Learned(
        memory=Calibration(rows=tuple(row for row in peaks if row is not None)),
        speed=MeasuredSpeeds(rows=tuple(row for row in speeds if row is not None)),
    )


def speed_row(one: MemoryObservation) -> SpeedRow | None:
    """Return what a trial teaches about speed, None where it teaches nothing."""
    plan = one.plan
    if not one.measured_tokens_per_s or plan.predicted_tokens_per_s <= 0:
        return None
    cold = plan.predicted_tokens_per_s / plan.speed_correction
    kind = KindOfRun(
        model_fingerprint=one.model_fingerprint,
        device_name=one.device_name,
        num_threads=plan.num_threads,
        method=one.settings.method,
        precision=one.pinned.precision,
    )
    return SpeedRow(kind=kind, ratio=one.measured_tokens_per_s / cold)
