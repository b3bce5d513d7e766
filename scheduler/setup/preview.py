"""`tune --dry-run`: the plan of a study, up to its first trial."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.masking import masked
from autosft.scheduler.events import Note, Observer, StudyOpened
from autosft.scheduler.loop.disk import check_before_start
from autosft.scheduler.setup.export_check import require_exportable
from autosft.scheduler.setup.folders import folder_of_study
from autosft.scheduler.setup.inputs import devices_named, require_plausible_inputs
from autosft.scheduler.setup.learned import learned_so_far
from autosft.scheduler.setup.open_study import PlannedStudy, checkpoint_demand, plan_study
from autosft.scheduler.setup.prompt_set import read_prompt_set
from autosft.studies.files.study_folder import size_of
from autosft.studies.metrics import find_metric
from autosft.studies.request import TuneRequest
from autosft.studies.store.database import default_storage_url, parse_url
from autosft.studies.store.records import open_records
from autosft.workers.training.trackers import check_installed


def preview_study(request: TuneRequest, *, observe: Observer) -> None:
    """Check and plan a study as `open_study` does, and report the plan; neither Ray nor a trial is started.

    Nothing is written but caches.  `--hardware` may also name devices that are not here.  Raises UserError
    for whatever the study would be refused for, except what only its cluster knows.
    """
    if request.address is not None:
        raise UserError(
            "--dry-run plans for this machine; what a cluster has is known once it is joined.",
            remedy="Leave --address out, and name its devices: --hardware 8xA100-80GB.",
        )
    storage_url = request.storage or default_storage_url()
    observe(Note(message=f"Study database: {masked(storage_url)}"))
    prompts = read_prompt_set(request)
    check_installed(request.report_to)
    require_plausible_inputs(request)
    hardware = devices_named(request.hardware, request.gpus, request.num_gpus)
    for note in hardware.notes:
        observe(Note(message=note))
    learned = learned_so_far(storage_url)
    planned = plan_study(
        request, hardware, spans_nodes=False, learned=learned, prompts=prompts, observe=observe
    )
    require_exportable(
        planned.request.export,
        planned.facts.model.source,
        trust_remote_code=planned.request.trust_remote_code,
        observe=observe,
    )
    is_known = is_stored(storage_url, planned.design.name)
    if not is_known:
        planned.design.budget.require_time()
    folder = folder_of_study(planned.request, planned.design.name)
    check_before_start(
        checkpoint_demand(planned),
        folder,
        disk_budget=planned.request.disk_budget,
        kept_bytes=size_of(folder),
    )
    observe(study_previewed(planned, folder, is_known=is_known))


def study_previewed(planned: PlannedStudy, folder: Path, *, is_known: bool) -> StudyOpened:
    """Return the plan as the event that a study begins with."""
    design, request = planned.design, planned.request
    return StudyOpened(
        study=design.name,
        plan_lines=(
            *planned.summary,
            f"Checkpoints: {folder}.",
            "Dry run: nothing was started; the same command without --dry-run "
            f"{'resumes' if is_known else 'begins'} the study.",
        ),
        num_trials=design.budget.num_trials,
        num_finished=0,
        earlier=(),
        metric=request.metric,
        minimize=find_metric(request.metric).minimize,
        deadline=None,
        expected_share=design.budget.share,
        num_slots=design.budget.num_slots,
    )


def is_stored(storage_url: str, name: str) -> bool:
    """Whether there is a study of this name to resume; never creates a database."""
    parsed = parse_url(storage_url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        return False
    with closing(open_records(storage_url)) as records:
        return records.find_study(name) is not None
