"""Optuna's tables as a projection of ours, for Optuna's dashboard and users' own scripts.

Nothing is ever read back from them.  Every function is idempotent and is called outside of our transactions;
`synchronise` completes what a killed process left half-done.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from autosft.profiles.errors import UserError
from autosft.studies.formatting import end_reason
from autosft.studies.search.sampling import distributions
from autosft.studies.search.space import SearchSpace, active
from autosft.studies.store.artifact_ids import artifact_attributes
from autosft.studies.trial import Measurement, TrialRecord, TrialState

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

logger = logging.getLogger(__name__)

#: User attributes: of a study, that it is ours; of a trial, its number in our tables.
_MARK = "autosft"

GIB = 2**30

# Optuna's tables of attributes, unchanged since its version 1 (tests compare them with what it reads).
_USER, _SYSTEM = (
    sa.table(name, sa.column("trial_id"), sa.column("key"), sa.column("value_json"))
    for name in ("trial_user_attributes", "trial_system_attributes")
)


def find_study(storage: RDBStorage, name: str) -> int | None:
    """Return the id of Optuna's study of this name, None if there is none."""
    try:
        study_id: int = storage.get_study_id_from_name(name)
    except KeyError:
        return None
    return study_id


def refuse_foreign_study(storage: RDBStorage, name: str) -> None:
    """Raise UserError if Optuna has a study of this name with trials that are not ours."""
    study_id = find_study(storage, name)
    if study_id is not None and storage.get_n_trials(study_id) > 0:
        raise UserError(
            f"The database already holds an Optuna study named {name!r} that autosft did not create.",
            remedy="Choose another name with --study.",
        )


class Projection:
    """One study in Optuna's tables."""

    def __init__(
        self,
        storage: RDBStorage,
        *,
        study: str,
        metric: str,
        maximize: bool,
        space: SearchSpace,
        attributes: Mapping[str, Any],
        key: int = 0,
    ) -> None:
        """Project the study with the primary key `key` in our tables."""
        self._storage = storage
        self._name = study
        self._metric = metric
        self._maximize = maximize
        self._space = space
        self._attributes = {"metric": metric, **attributes, _MARK: True}
        self._key = key
        self._is_behind = False
        self._study_id: int | None = None
        self._ids: dict[int, int] = {}  # our trial number -> Optuna's trial id
        self._changed: set[int] = set()  # numbers of trials that changed since the last `follow`
        self._told: dict[
            int, tuple[Measurement, ...]
        ] = {}  # evaluations already there, of trials that are not over

    def note(self, trial: int) -> None:
        """Record that one of our trials has changed."""
        self._changed.add(trial)

    def follow(self, trials: Sequence[TrialRecord]) -> None:
        """Bring the changed trials up to date, or all trials if an earlier step was missed.

        A trial that began and ended in between is one transaction.  A step is missed while another process
        keeps Optuna's tables locked, or after somebody deleted or ended our trials there, which the dashboard
        allows; that is logged, not raised.
        """
        from optuna.exceptions import OptunaError

        changed, self._changed = sorted(self._changed), set()
        try:
            if self._is_behind:
                self.synchronise(trials)
                return
            for number in changed:
                if number in self._ids:
                    self._continue(trials[number])
                else:
                    self.create(trials[number])
        except (OptunaError, DBAPIError, KeyError) as error:
            self._is_behind = True
            logger.warning("Optuna's tables are out of date; the study continues: %s", error)

    def _continue(self, trial: TrialRecord) -> None:
        """Add to an existing trial what it has measured since, and its end."""
        told = self._told.get(trial.number, ())
        for measurement in trial.measurements:
            if measurement not in told:
                self.measure(measurement)
        self._told[trial.number] = trial.measurements
        self.finish(trial)

    def describe(self, name: str, text: str) -> None:
        """Set an attribute of the study; logged where Optuna's tables are locked by somebody else."""
        from optuna.exceptions import OptunaError

        try:
            assert self._study_id is not None, "synchronise() comes first"
            self._storage.set_study_user_attr(self._study_id, name, text)
        except (OptunaError, DBAPIError, KeyError) as error:
            logger.warning("Optuna's tables are out of date; the study continues: %s", error)

    def synchronise(self, trials: Iterable[TrialRecord]) -> None:
        """Bring Optuna's tables up to date with all our trials, whatever state they are in.

        A trial of Optuna's without a row of ours was either being created when a driver died, or belongs to
        somebody else: it is closed as FAIL if it is open, and otherwise left alone.
        """
        from optuna.trial import TrialState as OptunaState

        study_id = self._prepare_study()
        theirs: dict[int | str, optuna.trial.FrozenTrial] = {}
        for trial in self._storage.get_all_trials(study_id, deepcopy=False):
            mark = trial.system_attrs.get(_MARK)
            if mark in theirs and theirs[mark].state is OptunaState.FAIL:  # it was taken up again
                theirs[f"superseded {trial.number}"] = theirs.pop(mark)
            theirs[f"unknown {trial.number}" if mark is None or mark in theirs else mark] = trial
        self._ids = {}
        for ours in trials:
            existing = theirs.pop(ours.number, None)
            is_taken_up = (
                existing is not None
                and existing.state is OptunaState.FAIL
                and ours.state is not TrialState.FAILED
            )
            if existing is None or is_taken_up:  # Optuna lets no trial that has ended be changed
                self.create(ours)
                continue
            self._ids[ours.number] = existing._trial_id
            if "trial" not in existing.user_attrs:  # a driver died before they were written
                self._set_attributes(existing._trial_id, self._template(ours))
            if not existing.state.is_finished():
                known = existing.intermediate_values
                for measurement in ours.measurements:
                    if measurement.num_tokens not in known:
                        self.measure(measurement)
                self.finish(ours)
        for stranger in theirs.values():
            if not stranger.state.is_finished():
                self._storage.set_trial_user_attr(stranger._trial_id, "because", "not a trial of autosft's")
                self._storage.set_trial_state_values(stranger._trial_id, OptunaState.FAIL)
        self._is_behind = False

    def create(self, trial: TrialRecord) -> None:
        """Add a trial in whatever state it is."""
        assert self._study_id is not None, "synchronise() comes first"
        template = self._template(trial)
        bare = copy.copy(template)
        bare.user_attrs, bare.system_attrs = {}, {_MARK: trial.number}
        trial_id = self._storage.create_new_trial(self._study_id, bare)
        self._ids[trial.number] = trial_id
        self._set_attributes(trial_id, template)
        if not trial.state.is_over:
            self._told[trial.number] = trial.measurements

    def measure(self, measurement: Measurement) -> None:
        """Add an evaluation at its number of training tokens."""
        value = measurement.metric(self._metric)
        trial_id = self._ids.get(measurement.trial)
        if value is not None and trial_id is not None:
            self._storage.set_trial_intermediate_value(trial_id, measurement.num_tokens, value)

    def finish(self, trial: TrialRecord) -> None:
        """Set the state of a trial that is over; last, since Optuna allows no change afterwards."""
        trial_id = self._ids.get(trial.number)
        if trial_id is None or not trial.state.is_over:
            return
        template = self._template(trial)
        self._set_attributes(trial_id, template)
        self._storage.set_trial_state_values(trial_id, template.state, template.values)
        self._told.pop(trial.number, None)

    def _set_attributes(self, trial_id: int, template: optuna.trial.FrozenTrial) -> None:
        """Write all attributes of a trial at once.

        Through Optuna's storage each would be a transaction of four statements, together most of a trial's
        cost to the driver.
        """
        with self._storage.engine.begin() as connection:
            for table, values in ((_USER, template.user_attrs), (_SYSTEM, template.system_attrs)):
                ours = table.c.trial_id == trial_id, table.c.key.in_(values)
                connection.execute(sa.delete(table).where(*ours))
                rows = [
                    {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                    for key, value in values.items()
                ]
                connection.execute(sa.insert(table), rows)

    def _prepare_study(self) -> int:
        import optuna

        direction = (
            optuna.study.StudyDirection.MAXIMIZE if self._maximize else optuna.study.StudyDirection.MINIMIZE
        )
        study_id = find_study(self._storage, self._name)
        if study_id is None:
            study_id = self._storage.create_new_study([direction], self._name)
        self._study_id = study_id
        present = self._storage.get_study_user_attrs(study_id)
        for key, value in self._attributes.items():
            if present.get(key) != value:
                self._storage.set_study_user_attr(study_id, key, value)
        if not self._storage.get_study_system_attrs(study_id):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study = optuna.load_study(study_name=self._name, storage=self._storage)
                study.set_metric_names([self._metric])
        return study_id

    def _template(self, trial: TrialRecord) -> optuna.trial.FrozenTrial:
        from optuna.trial import TrialState as OptunaState
        from optuna.trial import create_trial

        state = {
            TrialState.COMPLETED: OptunaState.COMPLETE,
            TrialState.STOPPED: OptunaState.PRUNED,
            TrialState.INFEASIBLE: OptunaState.PRUNED,
            TrialState.FAILED: OptunaState.FAIL,
        }.get(trial.state, OptunaState.RUNNING)
        values = [step.metric(self._metric) for step in trial.measurements]
        last = next((value for value in reversed(values) if value is not None), None)
        value = {TrialState.COMPLETED: trial.value, TrialState.STOPPED: last}.get(trial.state)
        parameters = dict(trial.parameters)
        constraints = constraints_of(trial)
        template = create_trial(
            state=state,
            value=None if value is None or math.isnan(value) else value,
            params=parameters,
            distributions=distributions(active(self._space, parameters)),
            user_attrs=_attributes(trial),
            system_attrs=self._attributes_at_start(trial) | constraint_list(constraints),
            intermediate_values={
                step.num_tokens: value
                for step, value in zip(trial.measurements, values, strict=True)
                if value is not None
            },
            # TPE looks at constraints before states: if told as FAIL, settings that ran out of memory come
            # again.
            constraints=constraints,
        )
        if trial.started_at is not None:
            template.datetime_start = datetime.fromtimestamp(trial.started_at)  # noqa: DTZ006 - Optuna's are local
        if trial.finished_at is not None:
            template.datetime_complete = datetime.fromtimestamp(trial.finished_at)  # noqa: DTZ006
        return template

    def _attributes_at_start(self, trial: TrialRecord) -> dict[str, Any]:
        """Return the system attributes that a trial has from start to end."""
        return {_MARK: trial.number, **artifact_attributes(self._key, trial.number)}


def constraints_of(trial: TrialRecord) -> dict[str, float] | None:
    """Return the constraints of a trial that is over; a value above zero is a violation."""
    if not trial.state.is_finished:
        return None
    ran_out = trial.failure is not None and trial.failure.is_out_of_device_memory
    is_infeasible = trial.state is TrialState.INFEASIBLE
    return {
        "predicted memory over budget": float(is_infeasible and not ran_out),
        "measured out of memory": float(is_infeasible and ran_out),
    }


def constraint_list(constraints: Mapping[str, float] | None) -> dict[str, Any]:
    """Return the constraints in the format before Optuna 5, the only one that its dashboard (0.21) shows."""
    return {} if constraints is None else {"constraints": list(constraints.values())}


def _attributes(trial: TrialRecord) -> dict[str, Any]:
    """Return what people want to see next to a trial's parameters, as text and with units."""
    attributes: dict[str, Any] = {"trial": trial.number, "origin": trial.origin}
    if not trial.state.is_over:
        return attributes
    attributes["state"] = trial.state.value
    if trial.num_attempts > 1:
        attributes["attempts"] = trial.num_attempts
    if text := end_reason(trial):  # a name that sorts to the top of the dashboard's list, which scrolls
        attributes["because"] = text
    if trial.best_step is not None:
        attributes["best step"] = trial.best_step
    if trial.best_checkpoint is not None:
        attributes["best checkpoint"] = trial.best_checkpoint
    if (plan := trial.plan) is not None:
        attributes["plan"] = (
            f"{plan.device_name}: micro batch {plan.micro_batch} x accumulation "
            f"{plan.gradient_accumulation} x devices {plan.data_parallel}"
        )
        if not plan.measures_itself:
            allocated = plan.estimate.allocated
            attributes["predicted memory, at most (GiB)"] = round(allocated.upper_bytes / GIB, 3)
            attributes["predicted memory (GiB)"] = round(allocated.median_bytes / GIB, 3)
    peaks = [step.peak_allocated_bytes for step in trial.measurements if step.peak_allocated_bytes]
    if peaks:
        attributes["measured memory (GiB)"] = round(max(peaks) / GIB, 3)
    speeds = [step.tokens_per_s for step in trial.measurements if step.tokens_per_s]
    if speeds:
        attributes["speed (tokens/s)"] = round(speeds[-1])
    if trial.started_at is not None and trial.finished_at is not None:
        attributes["from start to end (min)"] = round((trial.finished_at - trial.started_at) / 60, 2)
    return attributes
