"""What `autosft tune` does, with a training function that needs no model: the program that the suite kills.

    python -m tests.faults.driver '{"url": ..., "folder": ..., "num_trials": ..., "address": ...}'

Says in `FOLDER/drivers/PID.json` where its run lives.  Ends with the codes of the command line.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from autosft.cli import DONE, FAILED, INTERRUPTED, STOPPED, WRONG_REQUEST
from autosft.commands.stopping import StopSwitch
from autosft.profiles.errors import InterruptedRunError, StudyFailedError, UserError
from autosft.profiles.hardware.discover import profile_hardware
from autosft.profiles.hardware.leases import Leases
from autosft.scheduler.cluster.nodes import NodeDevices
from autosft.scheduler.cluster.ray_cluster import Cluster, connect, start_local
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import run_study
from autosft.studies.store.database import DatabaseError
from autosft.studies.values import StudyInUseError
from autosft.workers.processes.starters import WarmServer
from autosft.workers.runners.local_runner import LocalRunner
from benchmarks.empty_study import describe_study, taken_over
from tests.faults import ran_once, training

STUDY = "faults"
KEEP_BEST = 3
NUM_EVALUATIONS = 4
WITHOUT_RAY = "none"
TRAIN = f"{training.__name__}:train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    url: str
    folder: Path
    num_trials: int
    address: str | None = None  # of a cluster; a local one is started if not given
    study: str = STUDY
    is_of_queue: bool = False  # an item of a server, so that no other process may run it meanwhile


def main() -> int:
    given = json.loads(sys.argv[1])
    options = Options(**(given | {"folder": Path(given["folder"])}))
    if options.is_of_queue:
        ran_once.note(options.folder)
    try:
        with StopSwitch(on_abort=lambda: None) as stop:
            drive(options, stop)
    except KeyboardInterrupt:
        return STOPPED
    except StudyInUseError as error:
        print(error, file=sys.stderr)
        return WRONG_REQUEST
    except (InterruptedRunError, DatabaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INTERRUPTED
    except (StudyFailedError, UserError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    return STOPPED if stop.requested() else DONE


def drive(options: Options, stop: StopSwitch) -> None:
    if options.address == WITHOUT_RAY:
        drive_without_ray(options, stop)
        return
    with ExitStack() as stack:
        imports = [training.__name__]
        if options.address is None:
            cluster = stack.enter_context(start_local(imports=imports))
        else:
            cluster = stack.enter_context(connect(options.address, imports=imports))
        publish(options, cluster)
        here = profile_hardware("cpu")
        devices, on_nodes = None, {}
        if cluster.is_guest:
            devices = NodeDevices(cluster, here)
            stack.callback(devices.close)
            on_nodes = {"node_of": devices.node_of, "on_node_lost": devices.look_again}
        spec, run = describe_study(
            options.num_trials,
            options.folder,
            here.devices,
            name=options.study,
            num_evaluations=NUM_EVALUATIONS,
            keep_best=KEEP_BEST,
        )
        study = stack.enter_context(taken_over(options.url, spec))
        runner = cluster.runner(function=TRAIN, imports=imports, **on_nodes)
        stack.callback(lambda: runner.close(grace_s=0.0))
        stop.guard(runner)
        run_study(
            run,
            records=study,
            runner=runner,
            leases=MachineLeases(Leases(options.folder / "leases")),
            observe=lambda _: None,
            stop_requested=stop.requested,
            devices=devices,
        )


def drive_without_ray(options: Options, stop: StopSwitch) -> None:
    """Run the trials below a warm server of this process: a driver that starts in a second."""
    here = profile_hardware("cpu")
    spec, run = describe_study(
        options.num_trials,
        options.folder,
        here.devices,
        name=options.study,
        num_evaluations=NUM_EVALUATIONS,
        keep_best=KEEP_BEST,
    )
    with ExitStack() as stack:
        server = WarmServer(imports=[training.__name__])
        stack.callback(server.close)
        study = stack.enter_context(taken_over(options.url, spec))
        runner = LocalRunner(server, function=TRAIN)
        stack.callback(runner.close, grace_s=0.0)
        stop.guard(runner)
        run_study(
            run,
            records=study,
            runner=runner,
            leases=MachineLeases(Leases(options.folder / "leases")),
            observe=lambda _: None,
            stop_requested=stop.requested,
        )


def publish(options: Options, cluster: Cluster) -> None:
    assert isinstance(cluster.starter, WarmServer)
    folder = options.folder / "drivers"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"run_dir": str(cluster.starter.socket_path.parents[1]), "warm_server": cluster.starter.pid}
    staged = folder / f"{os.getpid()}.tmp"
    staged.write_text(json.dumps(about))
    staged.replace(folder / f"{os.getpid()}.json")


if __name__ == "__main__":
    sys.exit(main())
