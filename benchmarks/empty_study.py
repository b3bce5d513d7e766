"""A study in which everything fits and nothing is predicted to take time: for what costs beside training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.hardware.discover import profile_hardware
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.recipe import ByteRange, MemoryEstimate, Method, Precision
from autosft.scheduler.cluster.ray_cluster import start_local
from autosft.scheduler.decide.planner import StepSpeed
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.events import StudyEvent, TrialEnded
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.study_run import Slots, StudyRun
from autosft.studies.search.space import FixedSettings, default_space
from autosft.studies.store.records import Direction, StudySpec, open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import AttemptEnd, Measurement, PinnedSettings, StopReason, TrialJob
from autosft.studies.values import Driver

#: Bytes that a trial is said to need, at most.
NEED_BYTES = 64 << 20


def describe_study(
    num_trials: int,
    folder: Path,
    devices: Sequence[DeviceProfile],
    *,
    name: str = "empty",
    slots_a_device: int = 2,
    num_evaluations: int = 4,
    run_s: float = 1.0,
    rule: PruningRule | None = None,
    keep_best: int = 1,
) -> tuple[StudySpec, StudyRun]:
    """Return a study and its run; `folder` takes its checkpoints."""
    pinned = PinnedSettings(
        precision=Precision.FP32,
        tf32=False,
        attention="sdpa",
        eval_seq_len=64,
        eval_micro_batch=1,
        eval_fingerprint="0" * 64,
        num_evaluations=num_evaluations,
    )
    few = ByteRange(median_bytes=NEED_BYTES, upper_bytes=NEED_BYTES)
    small = MemoryEstimate(
        allocated=few,
        need=few,
        uncapped=few,
        outside_bytes=0,
        components=(("parameters", NEED_BYTES),),
        peak_phase="forward",
        peak_owner="parameters",
        method="closed form",
        bound_level=0.9,
        num_calibration_rows=0,
        untraced=(),
    )
    space = default_space(
        method=Method.FULL,
        num_parameters=1_000_000,
        num_train_examples=1000,
        seq_lens=[64],
        effective_batch_sizes=[8, 16],
    )
    study = StudySpec(
        name=name,
        metric="eval_loss",
        direction=Direction.MINIMIZE,
        model="none",
        model_fingerprint="0" * 64,
        data="none",
        data_fingerprint="0" * 64,
        pinned=pinned,
        fixed=FixedSettings(num_train_examples=1000),
        space=space,
        seed=0,
        num_trials=num_trials,
        environment={},
    )

    def share(device: DeviceProfile) -> Slots:
        return Slots(device=device, num_slots=slots_a_device, num_threads=1)

    run = StudyRun(
        name=name,
        model="none",
        data_dir=str(folder),
        output_dir=folder / "output",
        metric=study.metric,
        minimize=True,
        num_trials=num_trials,
        deadline=None,
        pinned=pinned,
        rule=rule or PruningRule(),
        slots=tuple(share(device) for device in devices),
        share=share,
        keep_best=keep_best,
        trust_remote_code=False,
        estimate=lambda *_: small,
        speed=lambda *_: StepSpeed(tokens_per_s=1000.0, run_s=run_s),
    )
    return study, run


@contextmanager
def taken_over(url: str, spec: StudySpec) -> Iterator[StudyRecords]:
    """Open a study, or go on with it, as the driver that this process is."""
    with closing(open_records(url)) as records:
        study = records.open_study(spec, now=time.time())
        study.take_over(Driver.current(), now=time.time())
        try:
            yield study
        finally:
            study.release(now=time.time())


def run_no_ops(
    num_trials: int,
    folder: Path,
    *,
    num_concurrent: int,
    on_end: Callable[[], object],
    function: str = "empty_study:no_op",
) -> None:
    """Run an empty study, or go on with it, on a private Ray; `on_end` hears each trial's end."""
    devices = profile_hardware("cpu").devices
    spec, run = describe_study(num_trials, folder, devices, slots_a_device=num_concurrent)
    run_on_ray(spec, run, folder, function=function, on_end=on_end)


def run_on_ray(
    spec: StudySpec,
    run: StudyRun,
    folder: Path,
    *,
    function: str,
    on_end: Callable[[], object],
    prepare_function: str | None = None,
    imports: Sequence[str] = (),
) -> None:
    """Run a study on a private Ray; its database is study.db in `folder`.

    `function` trains, as "module:name" of a module beside this one; the same with what loads ahead for it.
    """
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here}:{here.parent}"  # where the warm server finds the module
    module, _, _ = function.partition(":")

    def observe(event: StudyEvent) -> None:
        if isinstance(event, TrialEnded):
            on_end()

    url = f"sqlite:///{folder / 'study.db'}"
    with start_local(imports=[*imports, module]) as cluster, taken_over(url, spec) as study:
        runner = cluster.runner(function=function, prepare_function=prepare_function)
        cluster.wait_until_ready()
        run_study(
            run,
            records=study,
            runner=runner,
            leases=MachineLeases(Leases(folder / "leases")),
            observe=observe,
            stop_requested=lambda: False,
        )
        runner.close(grace_s=0.0)


# What each trial does


def no_op(
    job: TrialJob, report: Callable[[Measurement], None], _stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    """Report one evaluation and end; runs in the forked process."""
    report(
        Measurement(
            trial=job.trial,
            attempt=job.attempt,
            step=1,
            num_steps=1,
            num_tokens=1,
            loss=1.0,
            grad_norm=None,
            learning_rate=job.settings.learning_rate,
            tokens_per_s=None,
            peak_allocated_bytes=1,
            peak_reserved_bytes=None,
            metrics=(("eval_loss", objective(job.settings.learning_rate)),),
            evaluation=job.pinned.num_evaluations,
        )
    )
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=True,
        stopped=None,
        failure=None,
        message="",
        log_path=None,
        peak_allocated_bytes=1,
        peak_reserved_bytes=None,
        duration_s=0.0,
        eval_fingerprint=job.pinned.eval_fingerprint,
    )


def objective(learning_rate: float) -> float:
    return abs(learning_rate - 1e-4)
