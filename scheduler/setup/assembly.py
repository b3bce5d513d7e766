"""Turns a designed study into its database record and the run that the loop executes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autosft.scheduler.loop.disk import checkpoint_bytes
from autosft.scheduler.setup.design import Design
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.setup.folders import StudyFiles
from autosft.scheduler.study_run import StudyRun
from autosft.studies.metrics import find_metric
from autosft.studies.request import TuneRequest
from autosft.studies.trial import PromptScoring
from autosft.studies.values import Direction, StudySpec


def study_spec(
    design: Design,
    facts: StudyFacts,
    request: TuneRequest,
    files: StudyFiles,
    *,
    data_options: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> StudySpec:
    """Return what the database stores about a study: what decides what a score means, and how it is run."""
    return StudySpec(
        name=design.name,
        metric=request.metric,
        direction=Direction.MINIMIZE if find_metric(request.metric).minimize else Direction.MAXIMIZE,
        model=facts.model.source,
        model_fingerprint=facts.model.fingerprint,
        data=facts.data.source,
        data_fingerprint=facts.data.fingerprint,
        pinned=design.basis.pinned,
        fixed=design.basis.fixed,
        space=design.basis.space,
        seed=request.seed,
        num_trials=design.budget.num_trials,
        environment=environment,
        output_dir=str(files.folder),
        data_options=data_options,
        trust_remote_code=request.trust_remote_code,
        store_url=files.store_url or "",
    )


def study_run(
    design: Design,
    facts: StudyFacts,
    request: TuneRequest,
    files: StudyFiles,
    *,
    scoring: PromptScoring | None,
    deadline: float | None,
) -> StudyRun:
    """Return what the loop needs to know about a study; `deadline` in UNIX seconds."""
    basis = design.basis
    return StudyRun(
        name=design.name,
        model=facts.model.source,
        data_dir=files.data_dir,
        output_dir=files.folder,
        store_url=files.store_url,
        metric=request.metric,
        minimize=find_metric(request.metric).minimize,
        target=request.target_value(),
        num_trials=design.budget.num_trials,
        deadline=deadline,
        budget_runs=request.budget_runs,
        pinned=basis.pinned,
        scoring=scoring,
        rule=design.rule,
        expected_share=design.budget.share,
        slots=design.slots,
        share=design.share,
        is_mps_on=facts.is_mps_on,
        max_concurrent=request.max_concurrent,
        max_devices_per_trial=request.max_gpus_per_trial,
        keep_best=request.keep_best,
        checkpoint_bytes=checkpoint_bytes(basis.plan, basis.settings.method),
        disk_budget=request.disk_budget,
        allow_degrade=request.allow_degrade,
        trust_remote_code=request.trust_remote_code,
        report_to=request.report_to,
        estimate=facts.models.predict,
        speed=facts.models.speed,
        measured=facts.models.costs.measured,
    )
