"""From a request to a study that can run: hardware, model, data, plan, database, runner.

`open_study` is the one place where the parts are put together; `tuning.run_study` only uses them.  Decisions
are pure functions in `design`; this module reads, starts and stops things.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.masking import masked
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.own_folders import cache_folder
from autosft.scheduler.cluster.nodes import NodeDevices
from autosft.scheduler.cluster.ray_cluster import Cluster, connect, start_local
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.history import Learned
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.events import Note, Observer, StudyOpened
from autosft.scheduler.loop.disk import CheckpointDemand, check_before_start, checkpoint_bytes
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.plan.remedies import too_little_memory
from autosft.scheduler.setup.adapter_start import with_adapters_settings, with_merged_adapter
from autosft.scheduler.setup.assembly import study_run, study_spec
from autosft.scheduler.setup.demo import demo_request
from autosft.scheduler.setup.design import Basis, Design, design_study
from autosft.scheduler.setup.export_check import require_exportable
from autosft.scheduler.setup.facts import StudyFacts, read_facts
from autosft.scheduler.setup.first_trials import first_trials
from autosft.scheduler.setup.folders import (
    StudyFiles,
    output_folder,
    output_url,
    require_shared,
    shared_cache,
)
from autosft.scheduler.setup.inputs import (
    chosen_anywhere,
    data_options,
    found_devices,
    read_inputs,
    require_plausible_inputs,
    with_full_paths,
)
from autosft.scheduler.setup.learned import learned_so_far
from autosft.scheduler.setup.plan_summary import plan_summary
from autosft.scheduler.setup.prompt_set import PromptSet, read_prompt_set
from autosft.scheduler.setup.provenance import environment
from autosft.scheduler.setup.recorded_numerics import (
    as_recorded,
    former_defaults,
    with_recorded_precision,
    with_recorded_way,
)
from autosft.scheduler.setup.recorded_rates import recorded_rates, with_dimensions
from autosft.scheduler.setup.remote_output import open_store, require_storage, upload_data
from autosft.scheduler.setup.template_date import dated, known_dates
from autosft.scheduler.study_run import DeviceSource, LeaseBroker, StaticDevices, StudyRun
from autosft.studies.files import remote
from autosft.studies.files.storage import driver_module
from autosft.studies.files.study_folder import size_of
from autosft.studies.request import TuneRequest
from autosft.studies.store.database import default_storage_url
from autosft.studies.store.records import Records, open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import PromptScoring, TrialState
from autosft.studies.values import Driver
from autosft.studies.warm_start import WarmStart, earlier_studies, warm_start
from autosft.workers.processes.starters import WARM_IMPORTS, Starter
from autosft.workers.runner import TrialRunner
from autosft.workers.training.trackers import check_installed

DemoExamples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStudy:
    """A study with everything needed to run it; valid inside `open_study`."""

    request: TuneRequest
    run: StudyRun
    default: Basis  # the default configuration and its plan
    model: ModelProfile
    data: PreparedData
    demo_examples: DemoExamples  # held-out instructions of the demo; empty otherwise
    records: StudyRecords
    runner: TrialRunner
    starter: Starter  # starts processes on this machine, for work with tensors that is not a trial
    leases: LeaseBroker
    devices: DeviceSource
    hardware: ClusterProfile  # state before the first trial
    storage_url: str
    started_at: float  # UNIX seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """Where trials run; valid inside `open_platform`."""

    cluster: Cluster
    devices: DeviceSource
    hardware: ClusterProfile  # state at the start
    runner_options: Mapping[str, Any]  # what a runner needs to know about other nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStudy:
    """A study that is planned but not in the database yet."""

    request: TuneRequest  # with the demo's model and data, if it names none
    demo_examples: DemoExamples
    facts: StudyFacts
    design: Design
    summary: tuple[str, ...]  # of the plan, for the user
    deadline: float | None  # UNIX seconds


@contextmanager
def open_study(request: TuneRequest, *, observe: Observer) -> Iterator[OpenStudy]:
    """Prepare a study and its runner; end all processes on exit.

    Reports progress to `observe` (`Note`), and finally the plan (`StudyOpened`).  Raises UserError for an
    invalid request, before anything is written to the database.
    """
    started_at = time.time()
    storage_url = request.storage or default_storage_url()
    observe(Note(message=f"Study database: {masked(storage_url)}"))
    prompts = read_prompt_set(request)
    check_installed(request.report_to)
    require_plausible_inputs(request)
    imports = imports_for(request)
    with ExitStack() as stack:
        hardware = found_devices(request, observe)
        learned = learned_so_far(storage_url)
        platform = stack.enter_context(open_platform(request, hardware, imports))
        several = platform.cluster.is_guest and bool(platform.cluster.other_nodes())
        planned = plan_study(request, platform.hardware, several, learned, prompts, observe=observe)
        require_exportable(
            planned.request.export,
            planned.facts.model.source,
            trust_remote_code=planned.request.trust_remote_code,
            observe=observe,
        )
        folder, scoring = prepare_folder(planned, platform.cluster, storage_url)
        records = stack.enter_context(closing(open_records(storage_url)))
        if records.find_study(planned.design.name) is None:  # one that is resumed may have less to do
            planned.design.budget.require_time()
        stack.callback(remote.settle)
        files = study_files(planned, folder, records, platform.cluster)
        study, earlier = stack.enter_context(take_over(planned, files, records, platform.hardware))
        runner = platform.cluster.runner(imports=imports, **platform.runner_options)
        stack.callback(lambda: runner.close(grace_s=0.0))
        opened = OpenStudy(
            request=planned.request,
            run=replace(
                study_run(
                    planned.design,
                    planned.facts,
                    planned.request,
                    files,
                    scoring=scoring,
                    deadline=planned.deadline,
                ),
                earlier=earlier_studies(records, study.spec, planned.request.warm_start),
            ),
            default=planned.design.basis,
            model=planned.facts.model,
            data=planned.facts.data,
            demo_examples=planned.demo_examples,
            records=study,
            runner=runner,
            starter=platform.cluster.starter,
            leases=MachineLeases(Leases()),
            devices=platform.devices,
            hardware=platform.hardware,
            storage_url=storage_url,
            started_at=started_at,
        )
        observe(study_opened(opened, (*planned.summary, *earlier.lines)))
        yield opened


# Where trials run


def imports_for(request: TuneRequest) -> tuple[str, ...]:
    """Return what warm servers import; check that a URL as --output can be used.  Raises UserError."""
    url = output_url(request)
    if url is None:
        return WARM_IMPORTS
    require_storage(url)
    return (*WARM_IMPORTS, driver_module(url))


@contextmanager
def open_platform(
    request: TuneRequest, hardware: ClusterProfile, imports: tuple[str, ...]
) -> Iterator[Platform]:
    """Start Ray on this machine, or join the cluster at --address; `hardware` is this machine's."""
    with ExitStack() as stack:
        # Ray, the warm server and this process's own imports take seconds: run them concurrently.
        threading.Thread(target=import_heavy_modules, daemon=True).start()
        cluster = stack.enter_context(
            connect(request.address, imports=imports) if request.address else start_local(imports=imports)
        )
        if not cluster.is_guest:
            devices = StaticDevices(hardware)
            yield Platform(cluster=cluster, devices=devices, hardware=hardware, runner_options={})
            return
        chosen = chosen_anywhere(request)
        nodes = NodeDevices(cluster, hardware, is_asked=chosen or (lambda _: True))
        stack.callback(nodes.close)
        if not nodes.devices().devices:
            raise UserError(
                f"--gpus {request.gpus}: no node of the cluster at {request.address} has them.",
                remedy="See ray status; a node that has left may join again.",
            )
        yield Platform(
            cluster=cluster,
            devices=nodes,
            hardware=nodes.devices(),
            runner_options={"node_of": nodes.node_of, "on_node_lost": nodes.look_again},
        )


def import_heavy_modules() -> None:
    """Import in advance what planning and sampling will need; errors surface where it is used."""
    for name in ("torch", "transformers", "datasets", "optuna", "scipy.stats"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


# The plan


def plan_study(
    request: TuneRequest,
    hardware: ClusterProfile,
    spans_nodes: bool,
    learned: Learned,
    prompts: PromptSet | None,
    *,
    observe: Observer,
) -> PlannedStudy:
    """Read model and data, and plan the study on the devices of this machine or (`spans_nodes`) several.

    Raises UserError, with what would fit if nothing does.
    """
    demo_examples: DemoExamples = ()
    if request.model is None:
        request, demo_examples = demo_request(request, observe)
    request = with_merged_adapter(with_full_paths(request), observe)
    is_shared = output_url(request) is None and spans_nodes
    cache = shared_cache(request) if is_shared else cache_folder()
    dates = partial(known_dates, request, request.storage or default_storage_url())
    model, data = read_inputs(request, observe, cache_dir=cache / "data", known_dates=dates)
    request = with_adapters_settings(request, model)
    models = Models.of_data(
        model,
        data,
        request.evaluations,
        answers=None if prompts is None else prompts.answers,
        learned=learned,
        cache_dir=cache_folder() / "memory",
    )
    request = with_recorded_way(request, request.storage or default_storage_url())
    earlier = former_defaults(request, request.storage or default_storage_url())
    facts = read_facts(request, hardware, model=model, data=data, models=models, prompts=prompts)
    try:
        design = design_study(request, facts)
        rates = recorded_rates(request, facts, design, observe)
        if rates:
            design = design_study(with_dimensions(request, rates), facts)
        resumed = as_recorded(request, facts, design, earlier, observe)
        if resumed is not request:
            request, design = resumed, design_study(with_dimensions(resumed, rates), facts)
        kept = with_recorded_precision(request, design, observe)
        if kept is not request:
            design = design_study(with_dimensions(kept, rates), facts)
    except DoesNotFitError as error:
        raise too_little_memory(error, models) from error
    return PlannedStudy(
        request=request,
        demo_examples=demo_examples,
        facts=facts,
        design=design,
        summary=plan_summary(design, facts, request),
        deadline=None if request.time_budget is None else time.time() + request.time_budget,
    )


# Files and records


def prepare_folder(
    planned: PlannedStudy, cluster: Cluster, storage_url: str
) -> tuple[Path, PromptScoring | None]:
    """Create the study's folder, with the prompts that its checkpoints answer.

    Raises UserError if the disk is too small or another node of the cluster lacks files.
    """
    request, design, facts = planned.request, planned.design, planned.facts
    folder = output_folder(request, design.name)
    scoring = None if facts.prompts is None else facts.prompts.written_to(folder)
    require_shared(cluster, storage_url, request, output=folder, data=facts.data)
    demand = checkpoint_demand(planned)
    check_before_start(demand, folder, disk_budget=request.disk_budget, kept_bytes=size_of(folder))
    return folder, scoring


def checkpoint_demand(planned: PlannedStudy) -> CheckpointDemand:
    """Return what the study's checkpoints are predicted to take of a disk."""
    design = planned.design
    return CheckpointDemand(
        checkpoint_bytes=checkpoint_bytes(design.basis.plan, design.basis.settings.method),
        num_trials=design.budget.num_trials,
        num_concurrent=sum(shared.num_slots for shared in design.slots),
        keep_best=planned.request.keep_best,
        is_uploaded=output_url(planned.request) is not None,
    )


def study_files(planned: PlannedStudy, folder: Path, records: Records, cluster: Cluster) -> StudyFiles:
    """Return the locations of the study's files; for a URL as --output, upload what other nodes read."""
    base_url, name, data = output_url(planned.request), planned.design.name, planned.facts.data
    if base_url is None:
        return StudyFiles(folder=folder, data_dir=str(data.path), store_url=None)
    asked = planned.facts.prompts
    prompts = None if asked is None else folder / asked.file_name
    store_url = open_store(base_url, name, folder, stored=records.find_study(name), prompts=prompts)
    data_dir = upload_data(data, base_url) if cluster.is_guest else str(data.path)
    return StudyFiles(folder=folder, data_dir=data_dir, store_url=store_url)


@contextmanager
def take_over(
    planned: PlannedStudy, files: StudyFiles, records: Records, hardware: ClusterProfile
) -> Iterator[tuple[StudyRecords, WarmStart]]:
    """Become the driver of the study's records, new or resumed; release them at the end."""
    request = planned.request
    spec = study_spec(
        planned.design,
        planned.facts,
        request,
        files,
        data_options=data_options(request) | dated(planned.facts.data),
        environment=environment(hardware, request, planned.facts.model),
    )
    earlier = warm_start(records, spec, request.warm_start)
    study = records.open_study(spec, now=time.time())
    study.take_over(Driver.current(), now=time.time())
    try:
        for parameters, origin in first_trials(planned.design, earlier):
            study.enqueue(parameters, origin=origin, now=time.time())
        yield study, earlier
    finally:
        study.release(now=time.time())


def study_opened(opened: OpenStudy, summary: tuple[str, ...]) -> StudyOpened:
    """Return the event that tells observers about a study before its first trial.

    A resumed study, whose plan was shown when it began, lists where each of its trials resumes.
    """
    run, records = opened.run, opened.records
    trials, untuned = records.trials(), records.untuned()
    return StudyOpened(
        study=run.name,
        plan_lines=going_on_lines(records, summary) if trials else summary,
        num_trials=run.num_trials,
        num_finished=records.num_finished(),
        earlier=trials,
        metric=run.metric,
        minimize=run.minimize,
        deadline=run.deadline,
        expected_share=run.expected_share,
        num_slots=sum(shared.num_slots for shared in run.slots),
        untuned=None if untuned is None else untuned.metric(run.metric),
    )


#: Lines of a plan that may change each time a study is resumed.
OF_THIS_RUN = ("Device:", "Left out:", "Time budget", "Budget:")


def going_on_lines(records: StudyRecords, summary: tuple[str, ...]) -> tuple[str, ...]:
    """Return a line for each trial that resumes, and the lines of the plan that are specific to this run."""
    lines = [line for line in summary if line.startswith(OF_THIS_RUN)]
    for trial in records.unfinished():
        own = [kept for kept in records.checkpoints() if kept.trial == trial.number and kept.has_resume_state]
        last = max((kept.step for kept in own), default=0)
        num_steps = trial.settings.num_train_examples // trial.settings.effective_batch_size
        where = f"resumes at step {last + 1} of {num_steps}" if last else "starts over: it has no checkpoint"
        if trial.num_attempts and trial.state is not TrialState.PAUSED:
            lines.append(f"trial {trial.number} {where}")
    return tuple(lines)
