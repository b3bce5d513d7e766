"""The built-in demo: a small model on generated data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.own_folders import cache_folder
from autosft.scheduler.events import Note, Observer
from autosft.studies.request import TuneRequest

#: Trials of the demo: enough to see the search work, few enough for 90 s on two cores.
DEMO_TRIALS = 12
#: Passes over the demo's data in a full run: 100 steps of 32.
DEMO_EPOCHS = 1.0


def demo_request(request: TuneRequest, observe: Observer) -> tuple[TuneRequest, Sequence[Mapping[str, Any]]]:
    """Return the request with the demo's model and data, which are created if necessary.

    Also returns held-out instructions that the best model answers at the end.
    """
    from autosft.profiles.dataset.demo import write_demo_data

    observe(Note(message="No --model and --data: running the built-in demo."))
    paths = write_demo_data(cache_folder() / "demo-data", seed=0)
    model = make_demo_model(cache_folder(), observe)
    filled = request.model_copy(
        update={
            "model": model,
            "data": str(paths.train),
            "eval_data": str(paths.eval),
            "study": request.study or "demo",
            "trials": request.trials or (None if request.time_budget or request.budget_runs else DEMO_TRIALS),
            "epochs": request.epochs if "epochs" in request.model_fields_set else DEMO_EPOCHS,
        }
    )
    return filled, [json.loads(line) for line in paths.final.open()]


def make_demo_model(cache: Path, observe: Observer) -> str:
    """Return the folder of the demo's model, pre-training it first if it is not cached.

    Runs in a separate process: torch's threads, once started here, would not survive a fork.
    """
    observe(Note(message="Pre-training the demo's model, once: it takes about half a minute."))
    script = (
        "import sys; from pathlib import Path; "
        "from autosft.workers.tools.demo_model import ensure_demo_model; "
        "print(ensure_demo_model(Path(sys.argv[1]), num_threads=1))"  # two are no faster at this size
    )
    made = subprocess.run(
        python("-c", script, str(cache)),
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        observe(Note(message=made.stderr))
        raise UserError(f"the demo's model could not be made: {made.stderr.strip().splitlines()[-1]}")
    return made.stdout.strip().splitlines()[-1]
