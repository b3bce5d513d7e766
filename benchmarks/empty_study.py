"""A study in which everything fits and nothing is predicted to take time: for what costs beside training."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from autosft.profiles.hardware import DeviceProfile, profile_hardware
from autosft.profiles.leases import Leases
from autosft.profiles.recipe import ByteRange, MemoryEstimate, Method, Precision
from autosft.scheduler.cluster import start_local
from autosft.scheduler.events import Observer
from autosft.scheduler.leasing import MachineLeases
from autosft.scheduler.planner import StepSpeed
from autosft.scheduler.pruning import PruningRule
from autosft.scheduler.study_run import Slots, StudyRun
from autosft.scheduler.tuning import run_study
from autosft.studies.records import Direction, StudySpec, open_records
from autosft.studies.space import FixedSettings, default_space
from autosft.studies.trial import PinnedSettings
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
        slots=tuple(share(one) for one in devices),
        share=share,
        keep_best=keep_best,
        trust_remote_code=False,
        estimate=lambda *_: small,
        speed=lambda *_: StepSpeed(tokens_per_s=1000.0, run_s=run_s),
    )
    return study, run


def run_on_ray(
    num_trials: int, folder: Path, *, module: str, function: str, num_concurrent: int, observe: Observer
) -> None:
    """Run an empty study, or go on with it, on a private Ray; its database is study.db in `folder`.

    `module`, beside this one, has the training function.
    """
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the warm server finds the module
    spec, run = describe_study(
        num_trials, folder, profile_hardware("cpu").devices, slots_a_device=num_concurrent
    )
    url = f"sqlite:///{folder / 'study.db'}"
    with start_local(imports=[module]) as cluster, closing(open_records(url)) as records:
        study = records.open_study(spec, now=time.time())
        study.take_over(Driver.current(), now=time.time())
        runner = cluster.runner(function=f"{module}:{function}")
        cluster.wait_until_ready()
        run_study(
            run,
            records=study,
            runner=runner,
            leases=MachineLeases(Leases(folder / "leases")),
            observe=observe,
            stop_requested=lambda: False,
        )
        study.release(now=time.time())
        runner.close(grace_s=0.0)
