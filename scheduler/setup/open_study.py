"""From a request to a study that can run: hardware, model, data, plan, database, runner.

`open_study` is the one place where the parts are put together; `tuning.run_study` only uses them.  What is
decided here is decided by plain functions in `design`; this module reads, starts and stops things.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.model.profile import ModelProfile
from autosft.scheduler.cluster.nodes import NodeDevices
from autosft.scheduler.cluster.ray_cluster import connect, start_local
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.history import learned_so_far
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.events import Note, Observer, StudyOpened
from autosft.scheduler.loop.disk import check_before_start
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import DeviceSource, LeaseBroker, StaticDevices, StudyRun
from autosft.scheduler.plan.remedies import too_little_memory
from autosft.scheduler.setup.adapter_start import with_adapters_settings, with_merged_adapter
from autosft.scheduler.setup.demo import demo_request
from autosft.scheduler.setup.design import Design, design_study, with_prompts
from autosft.scheduler.setup.folders import output_folder, output_url, require_shared, shared_cache
from autosft.scheduler.setup.inputs import cache_folder, data_options, devices_here, read_inputs
from autosft.scheduler.setup.prompt_set import FILE_NAME, longest_answers, read_prompt_set
from autosft.scheduler.setup.provenance import environment
from autosft.scheduler.setup.remote_output import require_storage, shared_data, store_url_of
from autosft.studies.files import remote
from autosft.studies.files.study_folder import bring_here, size_of
from autosft.studies.request import TuneRequest
from autosft.studies.search.space import neighbours
from autosft.studies.store.database import default_storage_url
from autosft.studies.store.records import open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.values import Driver
from autosft.studies.warm_start import WarmStart, warm_start
from autosft.workers.processes.starters import WARM_IMPORTS, Starter
from autosft.workers.runner import TrialRunner
from autosft.workers.training.trackers import check_installed


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
        request = with_merged_adapter(request, observe)
        is_shared = base_url is None and cluster.is_guest and cluster.other_nodes()
        cache = shared_cache(request) if is_shared else cache_folder()
        model, data = read_inputs(request, observe, cache_dir=cache / "data")
        request = with_adapters_settings(request, model)
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
