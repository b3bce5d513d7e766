"""The program that `test_unlike_nodes` runs: a study over a cluster whose nodes declare unlike GPUs.

Says in lines of JSON when a trial starts, where and with what plan, and, once one has reported, what Ray's
own state API sees running on which node beside what is recorded.  A trial needs 30 GiB on one GPU or 15 GiB
on each of two; on a GPU of 8 GiB it needs 6 GiB for half a micro batch at a time.  Two that share the largest
stay there until its node is killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.state import list_nodes, list_tasks

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.profiles.hardware.discover import profile_hardware
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.recipe import ByteRange, MemoryEstimate, StepRecipe
from autosft.scheduler.cluster.nodes import NodeDevices
from autosft.scheduler.cluster.ray_cluster import connect
from autosft.scheduler.decide.planner import StepSpeed
from autosft.scheduler.events import StudyEvent, TrialEnded, TrialMeasured, TrialStarted
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.study_run import Slots
from autosft.studies.trial import AttemptEnd, Measurement, TrialJob
from benchmarks.empty_study import describe_study, taken_over
from tests.faults import training

GIB = 1 << 30
NUM_TRIALS = 14
TRIAL_S = 1.5
#: How long an attempt waits for being seen, and the driver for seeing it: Ray tells of tasks a second late.
SEEN_S = 20.0
#: The GPU whose node will be killed.
DOOMED = "GPU-large-0"
#: Files of the study's folder: what starts after the first waits for the second, so that the study is not
#: over before a node joins.
KILLED, JOINED = "a node was killed", "a node has joined"
JOIN_S = 90.0


def train(job: TrialJob, report: Any, stop_requested: Any) -> AttemptEnd:
    """Be the rank that trains, or one that only keeps it company."""
    time.sleep(TRIAL_S)
    folder = Path(job.data_dir)
    if (folder / KILLED).exists():
        wait_for(folder / JOINED, JOIN_S)
    if os.environ.get("RANK", "0") != "0":
        wait_for(seen_file(folder, job.trial, job.attempt), SEEN_S)
        return training.ended(job, None)

    def report_and_linger(measurement: Measurement) -> None:
        report(measurement)
        wait_for(seen_file(folder, job.trial, job.attempt), SEEN_S)
        if DOOMED in job.device_uuids:  # it is killed here, with most of its steps left for its next attempt
            wait_for(folder / JOINED, JOIN_S)

    return training.train(job, report_and_linger, stop_requested)


def seen_file(folder: Path, trial: int, attempt: int) -> Path:
    """Return the file that the driver makes once it has looked at what Ray says of an attempt."""
    return folder / f"seen-{trial}-{attempt}"


def wait_for(path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Joining:
    """Devices that leave a file when the new one is there."""

    devices_of: NodeDevices
    folder: Path

    def devices(self) -> ClusterProfile:
        found = self.devices_of.devices()
        if "GPU-new-0" in [device.uuid for device in found.devices]:
            (self.folder / JOINED).touch()
        return found


def main() -> None:
    address, dashboard, hardware = sys.argv[1:4]
    folder = Path(sys.argv[4])
    here = profile_hardware(hardware)
    # Declared, so NVML cannot be asked what is free of it: it counts as a device of somewhere else.
    here = replace(here, devices=tuple(replace(device, node="declared") for device in here.devices))
    with ExitStack() as stack:
        imports = ["tests.scheduler.unlike_nodes"]
        cluster = stack.enter_context(connect(address, imports=imports))
        devices = NodeDevices(cluster, here)
        stack.callback(devices.close)
        spec, run = describe_study(NUM_TRIALS, folder, devices.devices().devices)
        small = run.estimate(None, 1, 64, None)  # type: ignore[arg-type]

        def estimate(
            recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
        ) -> MemoryEstimate:
            num_bytes = 30 * GIB // recipe.data_parallel
            if device.total_bytes <= 8 * GIB and micro_batch * recipe.data_parallel < 8:
                num_bytes = 6 * GIB
            both = ByteRange(median_bytes=num_bytes, upper_bytes=num_bytes)
            return replace(small, allocated=both, need=both, uncapped=both)

        def speed(recipe: StepRecipe, micro_batch: int, *_: object) -> StepSpeed:
            # As soon over on any device, so that none is left for a faster one.
            return StepSpeed(tokens_per_s=100.0 * micro_batch, run_s=2.0, device_share=0.3)

        def share(device: DeviceProfile) -> Slots:
            return Slots(device=device, num_slots=2, num_threads=1)

        run = replace(
            run,
            estimate=estimate,
            speed=speed,
            share=share,
            slots=tuple(map(share, devices.devices().devices)),
        )
        study = stack.enter_context(taken_over(f"sqlite:///{folder / 'studies.db'}", spec))
        runner = cluster.runner(
            function=f"{imports[0]}:train",
            imports=imports,
            node_of=devices.node_of,
            on_node_lost=devices.look_again,
        )
        stack.callback(lambda: runner.close(grace_s=0.0))

        here_id = ray.get_runtime_context().get_node_id()
        has_reported: set[tuple[int, int]] = set()

        def observe(event: StudyEvent) -> None:
            if isinstance(event, TrialStarted):
                number, plan = event.record.number, event.record.plan
                [attempt] = [
                    attempt
                    for attempt in study.attempts()
                    if attempt.trial == number and attempt.ended_at is None
                ]
                assert plan is not None
                say(
                    started=name_of(number, event.attempt),
                    uuids=attempt.device_uuids,
                    micro_batch=plan.micro_batch,
                    data_parallel=plan.data_parallel,
                    node=devices.node_of.get(attempt.device_uuids[0], here_id),
                )
            elif isinstance(event, TrialMeasured):
                key = event.measurement.trial, event.measurement.attempt
                if key not in has_reported:
                    has_reported.add(key)
                    deadline = time.monotonic() + SEEN_S
                    while name_of(*key) not in (seen := running_by_ray(dashboard)):
                        if time.monotonic() > deadline:
                            break
                        time.sleep(0.2)
                    seen_file(folder, *key).touch()
                    say(reported=name_of(*key), seen=seen)
            elif isinstance(event, TrialEnded):
                say(ended=event.record.number, state=event.record.state.value)

        run_study(
            run,
            records=study,
            runner=runner,
            leases=MachineLeases(Leases(folder / "leases")),
            observe=observe,
            stop_requested=lambda: False,
            devices=Joining(devices, folder),
        )
        say(nodes=states_of_nodes(dashboard))
        say(finished=study.num_finished())


def name_of(trial: int, attempt: int) -> str:
    return f"TrialActor: trial {trial}, attempt {attempt}"


def running_by_ray(dashboard: str) -> dict[str, str]:
    """Return the attempts that Ray's state API sees running, with their nodes."""
    filters = [("func_or_class_name", "=", "TrialActor.run"), ("state", "=", "RUNNING")]
    return {
        task.name: str(task.node_id) for task in list_tasks(address=f"http://{dashboard}", filters=filters)
    }


def states_of_nodes(dashboard: str) -> dict[str, str]:
    return {node.node_id: node.state for node in list_nodes(address=f"http://{dashboard}")}


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
