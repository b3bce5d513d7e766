"""A study whose surroundings fail: runs it, breaks one thing at one moment, mends it, and runs it again.

    unshare --mount python -m tests.faults.surroundings '{"kind": ..., "moment": ..., "folder": ...}'

Real processes, files and mounts, in a mount namespace of its own, and no model.  Prints as JSON what was
said and how the runs ended; asserts that the study is exact.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.profiles.hardware.discover import profile_hardware
from autosft.profiles.hardware.leases import Leases
from autosft.scheduler.events import StudyEvent, TrialEnded, TrialMeasured, TrialStarted
from autosft.scheduler.loop import backing_off
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import run_study
from autosft.studies.files.checkpoints import verify
from autosft.studies.store import database
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from autosft.workers.processes.starters import WarmServer
from autosft.workers.runners.local_runner import LocalRunner
from benchmarks.empty_study import describe_study, taken_over
from tests.faults import training
from tests.faults.driver import KEEP_BEST, NUM_EVALUATIONS, STUDY
from tests.faults.holds import check_curve
from tests.faults.strikes import KINDS, Place, set_up

NUM_TRIALS = 2
#: When the fault strikes: as the first attempt starts, after its first evaluation, between two trials.
MOMENTS = ("start", "training", "between")


# --- a run --------------------------------------------------------------------------------------------


def run(place: Place, observe: Callable[[StudyEvent], None]) -> str | None:
    """Run the study, or go on with it; return the error that ended it, None without one."""
    device = replace(profile_hardware("cpu").devices[0], num_cores=1)
    spec, described = describe_study(
        NUM_TRIALS,
        place.root,
        [device],
        name=STUDY,
        slots_a_device=1,
        num_evaluations=NUM_EVALUATIONS,
        keep_best=KEEP_BEST,
    )
    described = replace(
        described,
        model=str(place.root / "model"),
        data_dir=str(place.root / "data"),
        output_dir=place.root / "output" / "study",
        checkpoint_bytes=1 << 10,
    )
    server = place.server = WarmServer(imports=[training.__name__])
    try:
        with ExitStack() as stack:
            study = stack.enter_context(taken_over(place.url, spec))
            runner = Runner(
                place, server, function=f"{training.__name__}:train_reading", hang_limit_s=hang_limit_s
            )
            stack.callback(runner.close, grace_s=0.0)
            run_study(
                described,
                records=study,
                runner=runner,
                leases=MachineLeases(Leases(place.root / "leases" / "kept")),
                observe=observe,
                stop_requested=lambda: False,
            )
    except (StudyFailedError, UserError) as error:
        return str(error)
    finally:
        server.close()
    return None


class Runner(LocalRunner):
    """With a clock that can be set."""

    def __init__(self, place: Place, server: WarmServer, **options: object) -> None:
        super().__init__(server, **options)
        self._place = place

    def now(self) -> float:
        return time.time() + self._place.clock_step_s


def hang_limit_s(job: object, *, has_begun: bool) -> float:
    return 3.0 if has_begun else 120.0


def is_moment(event: StudyEvent, moment: str) -> bool:
    match event, moment:
        case TrialStarted(), "start":
            return True
        case TrialMeasured(measurement=measurement), "training":
            return measurement.evaluation is not None
        case TrialEnded(), "between":
            return True
    return False


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Wait for seconds where a study would wait for a minute."""
    backing_off.WAITS_S = (0.1, 0.2, 0.3)
    backing_off.LOST_WAITS_S = (0.0, 0.1, 0.2)
    database.QUIET_S, database.AWAY_S, database.RETRY_S = 0.1, 5.0, 0.05
    yield


def main() -> None:
    given = json.loads(sys.argv[1])
    place, kind = Place(Path(given["folder"])), KINDS[given["kind"]]
    said: list[str] = []
    has_struck = False

    def observe(event: StudyEvent) -> None:
        nonlocal has_struck
        message = getattr(event, "message", None) or getattr(getattr(event, "record", None), "message", "")
        said.append(message)
        if not has_struck and is_moment(event, given["moment"]):
            has_struck = True
            kind.strike(place)
        if "disk of" in message and place.undo:  # a study that waits for space goes on by itself
            place.undo.pop()()

    set_up(place, breaking=kind.breaking)
    tempfile.tempdir = str(place.root / "temporary")
    os.environ["TMPDIR"] = tempfile.tempdir
    with quick():
        error = run(place, observe)
        assert has_struck
        for undo in place.undo:
            undo()
        place.clock_step_s = 0.0
        second = run(place, observe) if error is not None else None
    if second is None:
        check_exact(place, has_checkpoints=given["kind"] != "output deleted")
    told = {"error": error, "said": said, "second": second, "has_victim": place.has_victim}
    print(json.dumps(told))


def check_exact(place: Place, *, has_checkpoints: bool) -> None:
    """Assert that the study is what it would have been in good surroundings, its checkpoints whole."""
    with closing(open_records(place.url)) as records:
        study = records.read_study(STUDY)
        trials = study.trials()
        assert [trial.state for trial in trials] == [TrialState.COMPLETED] * NUM_TRIALS, trials
        for trial in trials:
            check_curve(trial)
        best = min(trials, key=lambda trial: trial.value or 0.0)
        assert best.best_checkpoint is not None
        if has_checkpoints:
            verify(Path(best.best_checkpoint))
        for attempt in study.attempts():
            assert attempt.ended_at is not None


if __name__ == "__main__":
    main()
