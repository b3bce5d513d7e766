"""From a request to a study that can run: hardware, model, data, plan, database, runner.

`open_study` is the one place where the parts are put together; `tuning.run_study` only uses them.  What is
decided here is decided by plain functions in `design`; this module reads, starts and stops things.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.benchmark import with_measured_rates
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind
from autosft.profiles.hardware.discover import profile_hardware, select
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.model.profile import ModelProfile, load_model_profile
from autosft.scheduler.cluster.nodes import NodeDevices, require_everywhere
from autosft.scheduler.cluster.ray_cluster import Cluster, connect, start_local
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.history import learned_so_far
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.design import Design, design_study
from autosft.scheduler.events import Note, Observer, StudyOpened
from autosft.scheduler.loop.disk import check_before_start
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import DeviceSource, LeaseBroker, StaticDevices, StudyRun
from autosft.scheduler.plan.remedies import too_little_memory
from autosft.scheduler.prompt_scoring import FILE_NAME, longest_answers, read_prompt_set, with_prompts
from autosft.scheduler.storing import (
    bring_here,
    folder_here,
    require_storage,
    require_storage_on_nodes,
    shared_data,
    store_url_of,
)
from autosft.studies import remote
from autosft.studies.checkpoints import slug
from autosft.studies.database import default_storage_url, parse_url
from autosft.studies.folder import size_of
from autosft.studies.records import open_records
from autosft.studies.request import TuneRequest
from autosft.studies.space import neighbours, rounds_of
from autosft.studies.study_records import StudyRecords
from autosft.studies.values import Driver
from autosft.studies.warm_start import WarmStart, warm_start
from autosft.studies.wire import to_plain
from autosft.workers.process import WARM_IMPORTS, Starter
from autosft.workers.runner import TrialRunner
from autosft.workers.tracking import check_installed

#: Trials of the demo: enough for the search to be seen working, few enough for 90 s on two cores.
DEMO_TRIALS = 12
#: Passes over the demo's data in a full run: 100 steps of 32.
DEMO_EPOCHS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStudy:
    """A study with everything that running it needs; valid inside `open_study`."""

    request: TuneRequest
    run: StudyRun
    model: ModelProfile
    data: PreparedData
    demo_examples: Sequence[Mapping[str, Any]]  # held-out instructions of the demo, else empty
    records: StudyRecords
    runner: TrialRunner
    starter: Starter  # of processes on this machine, for work with tensors that is no trial
    leases: LeaseBroker
    devices: DeviceSource
    hardware: ClusterProfile  # as it was before the first trial
    storage_url: str
    started_at: float  # UNIX seconds


@contextmanager
def open_study(request: TuneRequest, *, observe: Observer) -> Iterator[OpenStudy]:
    """Prepare a study and its runner; end every process of ours on the way out.

    Tells `observe` what is being done (`Note`) and at last what was planned (`StudyOpened`).  Raises
    UserError for whatever the request gets wrong, before anything is written to the database.
    """
    started_at = time.time()
    storage_url = request.storage or default_storage_url()
    observe(Note(message=f"Study database: {storage_url}"))
    prompts = read_prompt_set(request)
    check_installed(request.report_to)
    base_url = output_url(request)
    imports: tuple[str, ...] = WARM_IMPORTS
    if base_url is not None:
        require_storage(base_url)
        imports += (remote.driver_module(base_url),)
    with ExitStack() as stack:
        hardware = devices_here(request.hardware, request.gpus, request.num_gpus)
        learned_before = learned_so_far(storage_url)
        # Ray, the warm server and this process's own imports take seconds: side by side.
        threading.Thread(target=import_heavy_modules, daemon=True).start()
        cluster = stack.enter_context(
            connect(request.address, imports=imports) if request.address else start_local(imports=imports)
        )
        devices: DeviceSource = StaticDevices(hardware)
        on_nodes: dict[str, Any] = {}
        if cluster.is_guest:
            devices = followed = NodeDevices(cluster, hardware)
            stack.callback(followed.close)
            hardware = followed.devices()
            on_nodes = {"node_of": followed.node_of, "on_node_lost": followed.look_again}
        demo_examples: Sequence[Mapping[str, Any]] = ()
        if request.model is None:
            request, demo_examples = demo_request(request, observe)
        is_shared = base_url is None and cluster.is_guest and cluster.other_nodes()
        cache = shared_cache(request) if is_shared else cache_folder()
        model, data = read_inputs(request, observe, cache_dir=cache / "data")
        predicted_with: dict[str, Any] = {
            "answers": None if prompts is None else prompts.answers,
            "learned": learned_before,
            "cache_dir": cache_folder() / "memory",
        }
        generation = None if prompts is None else longest_answers(prompts, data)
        try:
            design = design_study(request, hardware, model, data, generation=generation, **predicted_with)
        except DoesNotFitError as error:
            models = Models.of_data(model, data, request.evaluations, **predicted_with)
            raise too_little_memory(error, models) from error
        output = output_folder(request, design.spec.name)
        if prompts is not None:
            design = with_prompts(design, prompts, output)
        require_shared(cluster, storage_url, request, output=output, data=data)
        run = replace(design.run, output_dir=output, store_url=base_url)
        check_before_start(run, kept_bytes=size_of(output))
        records = stack.enter_context(closing(open_records(storage_url)))
        if base_url is not None:
            store_url = store_url_of(base_url, design.spec.name, records.find_study(design.spec.name))
            run = replace(run, store_url=store_url)
            if cluster.is_guest:
                run = replace(run, data_dir=shared_data(data, base_url))
            if prompts is not None:
                remote.put_file(output / FILE_NAME, f"{store_url}/{FILE_NAME}")
            bring_here(store_url, output)
            stack.callback(remote.settle)
        spec = replace(
            design.spec,
            output_dir=str(output),
            environment=environment(hardware, request, model),
            data_options=data_options(request),
            trust_remote_code=request.trust_remote_code,
            store_url=run.store_url or "",
        )
        earlier = warm_start(records, spec, request.warm_start)
        study = records.open_study(spec, now=time.time())
        study.take_over(Driver.current(), now=time.time())
        stack.callback(lambda: study.release(now=time.time()))
        for parameters, origin in first_trials(design, earlier):
            study.enqueue(parameters, origin=origin, now=time.time())
        runner = cluster.runner(imports=imports, **on_nodes)
        stack.callback(lambda: runner.close(grace_s=0.0))
        opened = OpenStudy(
            request=request,
            run=run,
            model=model,
            data=data,
            demo_examples=demo_examples,
            records=study,
            runner=runner,
            starter=cluster.starter,
            leases=MachineLeases(Leases()),
            devices=devices,
            hardware=hardware,
            storage_url=storage_url,
            started_at=started_at,
        )
        observe(
            StudyOpened(
                study=spec.name,
                plan_lines=(*design.lines, *earlier.lines),
                num_trials=design.run.num_trials,
                num_finished=study.num_finished(),
                earlier=study.trials(),
                metric=spec.metric,
                minimize=design.run.minimize,
                deadline=design.run.deadline,
            )
        )
        yield opened


def import_heavy_modules() -> None:
    """Import ahead of time what planning and sampling will need; an error shows where it is needed."""
    for name in ("torch", "transformers", "datasets", "optuna", "scipy.stats"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def devices_here(spec: str, gpus: str | None = None, num_gpus: int | None = None) -> ClusterProfile:
    """Return the devices that `--hardware`, `--gpus` and `--num-gpus` mean, with the rates measured earlier.

    Raises UserError for devices that are only known by name or from a file.
    """
    hardware = devices_named(spec, gpus, num_gpus)
    if any(device.is_assumed for device in hardware.devices):
        raise UserError(
            f"--hardware {spec} is not in this machine, so nothing can be trained on it.",
            remedy="Use autosft plan to see what would fit there, or --hardware auto to train here.",
        )
    return hardware


def devices_named(spec: str, gpus: str | None = None, num_gpus: int | None = None) -> ClusterProfile:
    """Return the devices that `--hardware`, `--gpus` and `--num-gpus` mean, here or not."""
    hardware = with_measured_rates(profile_hardware(spec))
    if gpus is not None:
        hardware = select(hardware, gpus)
    return hardware if num_gpus is None else the_freest(hardware, num_gpus)


def the_freest(hardware: ClusterProfile, num_gpus: int) -> ClusterProfile:
    """Keep the GPUs with most memory free, of equal ones the first.  Raises UserError for too many.

    A CPU that was declared as several devices counts like them.
    """
    on_cpu = len(hardware.devices) == 1
    gpus = [one for one in hardware.devices if one.kind is DeviceKind.CUDA or not on_cpu]
    if num_gpus > len(gpus):
        raise UserError(
            f"--num-gpus {num_gpus}: there {'is' if len(gpus) == 1 else 'are'} {len(gpus) or 'no'} "
            f"GPU{'' if len(gpus) == 1 else 's'} here.",
            remedy=f"Use at most {len(gpus)}." if gpus else "Leave --num-gpus out to use the CPU.",
        )
    chosen = sorted(gpus, key=lambda one: (-one.free_bytes, one.node, one.index))[:num_gpus]
    return replace(hardware, devices=tuple(one for one in hardware.devices if one in chosen))


def read_inputs(
    request: TuneRequest, observe: Observer, *, cache_dir: Path
) -> tuple[ModelProfile, PreparedData]:
    """Read the model's configuration and the data, tokenized and split."""
    assert request.model is not None
    assert request.data is not None
    observe(Note(message=f"Reading {request.model} and {request.data}"))
    # It replaces itself when it is imported: whoever waits for another thread's import is given what it was
    # before, which has nothing in it.  The next import, behind this one, gets the new one.
    importlib.import_module("transformers")
    model = load_model_profile(request.model, trust_remote_code=request.trust_remote_code)
    if model.note:
        observe(Note(message=model.note))
    data = prepare(
        request.data,
        model=request.model,
        cache_dir=cache_dir,
        max_positions=model.max_positions or None,
        trust_remote_code=request.trust_remote_code,
        **data_options(request),
    )
    return model, data


def data_options(request: TuneRequest) -> dict[str, Any]:
    """Return what decides how the data is prepared, as keyword arguments of `prepare`."""
    dimension = request.dimensions().get("max_rounds")
    rounds = () if dimension is None else rounds_of(dimension)
    return {
        "eval_data": request.eval_data,
        "seed": request.seed,
        "skip_bad_records": request.skip_bad_records,
        "max_rounds": rounds[0] if len(rounds) == 1 else None,
        "train_rounds": rounds if len(rounds) > 1 else (),
        "block_size": request.block_size,
    }


def cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("autosft"))


def demo_request(request: TuneRequest, observe: Observer) -> tuple[TuneRequest, Sequence[Mapping[str, Any]]]:
    """Return the request with the demo's model and data, made first where they are missing.

    Beside it the held-out instructions that the best model is shown at the end.
    """
    from autosft.profiles.dataset.demo import write_demo_data

    observe(Note(message="No --model and --data: running the embedded demo."))
    paths = write_demo_data(cache_folder() / "demo-data", seed=0)
    model = make_demo_model(cache_folder(), observe)
    filled = request.model_copy(
        update={
            "model": model,
            "data": str(paths.train),
            "eval_data": str(paths.eval),
            "study": request.study or "demo",
            "trials": request.trials or (None if request.time_budget else DEMO_TRIALS),
            "epochs": request.epochs if "epochs" in request.model_fields_set else DEMO_EPOCHS,
        }
    )
    return filled, [json.loads(line) for line in paths.final.open()]


def make_demo_model(cache: Path, observe: Observer) -> str:
    """Return the demo's model folder, pre-trained on the spot where it is not cached.

    In a process of its own: torch's threads, once started here, would not survive a fork.
    """
    observe(Note(message="Making the demo's model, once: pre-training takes about half a minute."))
    script = (
        "import sys; from pathlib import Path; from autosft.workers.demo import ensure_demo_model;"
        "print(ensure_demo_model(Path(sys.argv[1]), num_threads=1))"  # two gain nothing at this size
    )
    made = subprocess.run(
        [sys.executable, "-c", script, str(cache)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        observe(Note(message=made.stderr))
        raise UserError(f"the demo's model could not be made: {made.stderr.strip().splitlines()[-1]}")
    return made.stdout.strip().splitlines()[-1]


def shared_cache(request: TuneRequest) -> Path:
    """Return where prepared data goes that the nodes of a cluster read: beside the studies."""
    return output_base(request) / ".cache"


def require_shared(
    cluster: Cluster, storage_url: str, request: TuneRequest, *, output: Path, data: PreparedData
) -> None:
    """Raise UserError where another node of the cluster lacks what its trials read and write.

    Only the driver writes the database; but one in a file of this machine is lost with it, and a job that is
    sent again may start on another one.
    """
    database = parse_url(storage_url)
    if database.get_backend_name() == "sqlite":
        require_everywhere(
            cluster,
            {"--storage": Path(database.database or "").parent},
            remedy="Use --storage postgresql://USER@HOST/DATABASE, or a file in a folder that all share.",
        )
    inputs = {"--output": output, "the prepared data": data.path}
    if (base_url := output_url(request)) is not None:
        require_storage_on_nodes(cluster, base_url, output)
        inputs = {}
    if request.model is not None and Path(request.model).exists():
        inputs["--model"] = Path(request.model).absolute()
    require_everywhere(cluster, inputs, remedy="Use folders that all nodes share, under the same names.")


def output_base(request: TuneRequest) -> Path:
    if (url := output_url(request)) is not None:
        return folder_here(url)
    base = Path(request.output or Path(platformdirs.user_data_dir("autosft")) / "studies")
    return base.expanduser().resolve()


def output_url(request: TuneRequest) -> str | None:
    """Return the URL of `--output`, None for a folder."""
    return request.output if request.output is not None and remote.is_url(request.output) else None


def output_folder(request: TuneRequest, study: str) -> Path:
    """Return the study's folder, made and writable.  Raises UserError."""
    base = output_base(request)
    folder = base / slug(study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {base}: cannot be written to ({error.strerror}).", remedy="Choose another folder."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {base}: cannot be written to.", remedy="Choose another folder.")
    return folder


def first_trials(design: Design, earlier: WarmStart) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the trials that come before the sampler's: the rule-based default and its neighbours.

    Between them those of earlier studies: the gain of the search is measured against the default.
    Strategies of a preset come before the default and take the place of its neighbours.
    """
    for parameters, origin in design.strategies:
        yield dict(parameters), origin
    yield dict(design.default_parameters), "default"
    for parameters in earlier.trials:
        yield dict(parameters), "warm start"
    if design.strategies:
        return
    for parameters in neighbours(design.spec.space, design.default_parameters):
        yield parameters, "neighbour"


def environment(hardware: ClusterProfile, request: TuneRequest, model: ModelProfile) -> dict[str, Any]:
    """Return what was asked for, and what a result may depend on and no setting says."""
    packages = ("autosft", "torch", "transformers", "trl", "peft", "accelerate", "optuna", "ray")
    return {
        "goal": request.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"notify", "storage"},  # they may hold secrets
        ),
        "model": {"architecture": model.architecture, "num_parameters": model.num_parameters},
        "hardware": to_plain(hardware),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Return commit and whether files are changed, where autosft is started inside a git checkout."""
    try:
        commit, changed = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=False, timeout=5)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "is_changed": bool(changed.stdout.strip())}
