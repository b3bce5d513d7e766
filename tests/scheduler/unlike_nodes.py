"""The program that `test_unlike_nodes` runs: a study over a cluster whose nodes declare unlike GPUs.

Says in lines of JSON when a trial starts, where, with what plan, and where Ray's state API sees actors.  A
trial needs 30 GiB on one GPU or 15 GiB on each of two, or, on a GPU that cannot hold this, 6 GiB for half a
micro batch at a time.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosft.profiles.hardware import DeviceProfile, profile_hardware
from autosft.profiles.leases import Leases
from autosft.profiles.recipe import ByteRange, MemoryEstimate, StepRecipe
from autosft.scheduler.cluster import connect
from autosft.scheduler.events import StudyEvent, TrialEnded, TrialStarted
from autosft.scheduler.leasing import MachineLeases
from autosft.scheduler.nodes import NodeDevices
from autosft.scheduler.planner import StepSpeed
from autosft.scheduler.study_run import Slots
from autosft.scheduler.tuning import run_study
from autosft.studies.records import open_records
from autosft.studies.trial import AttemptEnd, TrialJob
from autosft.studies.values import Driver
from benchmarks.empty_study import describe_study
from tests.faults import training

GIB = 1 << 30
NUM_TRIALS = 26
#: Long enough that a node joins, which takes some ten seconds, before the study is over.
TRIAL_S = 4.0


def train(job: TrialJob, report: Any, stop_requested: Any) -> AttemptEnd:
    """Be the rank that trains, or one that only keeps it company."""
    time.sleep(TRIAL_S)
    if os.environ.get("RANK", "0") == "0":
        return training.train(job, report, stop_requested)
    time.sleep(training.NUM_STEPS * training.STEP_S)
    return training.ended(job, None)


def main() -> None:
    address, dashboard, hardware = sys.argv[1:4]
    folder = Path(sys.argv[4])
    here = profile_hardware(hardware)
    # Declared, so NVML cannot be asked what is free of it: it counts as a device of somewhere else.
    here = replace(here, devices=tuple(replace(one, node="declared") for one in here.devices))
    with ExitStack() as stack:
        imports = ["tests.scheduler.unlike_nodes"]
        cluster = stack.enter_context(connect(address, imports=imports))
        devices = NodeDevices(cluster, here)
        stack.callback(devices.close)
        spec, run = describe_study(NUM_TRIALS, folder, devices.devices().devices)
        small = run.estimate(None, 1, 64, None)  # type: ignore[arg-type]

        def estimate(recipe: StepRecipe, micro_batch: int, *_: object) -> MemoryEstimate:
            rows = micro_batch * recipe.data_parallel
            num_bytes = 30 * GIB // recipe.data_parallel if rows >= 8 else 6 * GIB
            both = ByteRange(median_bytes=num_bytes, upper_bytes=num_bytes)
            return replace(small, allocated=both, need=both, uncapped=both)

        def speed(recipe: StepRecipe, micro_batch: int, *_: object) -> StepSpeed:
            rows = micro_batch * recipe.data_parallel
            return StepSpeed(tokens_per_s=100.0 * rows, run_s=8.0 / rows, device_share=0.3)

        def share(device: DeviceProfile) -> Slots:
            return Slots(device=device, num_slots=2, num_threads=1)

        run = replace(
            run,
            estimate=estimate,
            speed=speed,
            share=share,
            slots=tuple(map(share, devices.devices().devices)),
        )
        records = stack.enter_context(closing(open_records(f"sqlite:///{folder / 'studies.db'}")))
        study = records.open_study(spec, now=time.time())
        study.take_over(Driver.current(), now=time.time())
        runner = cluster.runner(function=f"{imports[0]}:train", imports=imports, node_of=devices.node_of)
        stack.callback(lambda: runner.close(grace_s=0.0))

        def observe(event: StudyEvent) -> None:
            if isinstance(event, TrialStarted):
                number = event.record.number
                [attempt] = [one for one in study.attempts() if one.trial == number and one.ended_at is None]
                plan = event.record.plan
                assert plan is not None
                say(
                    trial=number,
                    uuids=attempt.device_uuids,
                    micro_batch=plan.micro_batch,
                    data_parallel=plan.data_parallel,
                    actors=actors_by_node(dashboard),
                    nodes=devices.node_of,
                )
            elif isinstance(event, TrialEnded):
                say(ended=event.record.number, state=event.record.state.value)

        run_study(
            run,
            records=study,
            runner=runner,
            leases=MachineLeases(Leases(folder / "leases")),
            observe=observe,
            stop_requested=lambda: False,
            devices=devices,
        )
        say(finished=study.num_finished())


def actors_by_node(dashboard: str) -> dict[str, int]:
    """Return how many trial actors Ray's own state API sees alive on each node."""
    from ray.util.state import list_actors

    alive = [("class_name", "=", "TrialActor"), ("state", "=", "ALIVE")]
    found = list_actors(address=f"http://{dashboard}", filters=alive, limit=1000)
    return dict(collections.Counter(str(actor.node_id) for actor in found))


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
