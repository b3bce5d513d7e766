"""The study database: what was requested, what happened, and what a resumed study continues from.

The only module through which upper layers reach the database.  Our tables are the only truth; Optuna's, in
the same database, are a projection of them for its dashboard (`autosft.studies.store.optuna_projection`).

Order of use:

    records = open_records(url)                      # UserError for a wrong or broken database
    study = records.open_study(spec, now=now)        # created, or resumed
    study.take_over(Driver.current(), now=now)       # the only writer from here on; call heartbeat() often
    study.recover(now=now)                           # attempts of a dead driver are abandoned
    trial = study.ask(now=now)                       # enqueued ones first, then the sampler
    attempt = study.begin_attempt(trial.number, plan=plan, device_uuids=uuids, now=now)
    study.record(measurement, now=now)               # False: the attempt is over, the report was refused
    study.end_attempt(end, TrialState.COMPLETED, now=now)
    study.release(now=now)
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from autosft.profiles.errors import UserError
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import slug
from autosft.studies.files.study_folder import Removed, folder_of, remove_files
from autosft.studies.search.space import Parameters
from autosft.studies.store import rows, tables
from autosft.studies.store.database import (
    begin,
    connect,
    default_storage_url,
    display,
    open_optuna,
    parse_url,
    readable_errors,
    readable_rows,
    upgrade,
)
from autosft.studies.store.driver_lease import refuse_if_alive
from autosft.studies.store.optuna_projection import find_study as find_optuna_study
from autosft.studies.store.optuna_projection import refuse_foreign_study
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.store.upkeep import delete_rows, rename_rows
from autosft.studies.trial import TrialState
from autosft.studies.values import (
    CheckpointRecord,
    CheckpointScore,
    Command,
    CommandKind,
    Direction,
    Driver,
    LeaseLostError,
    MemoryObservation,
    StudyInUseError,
    StudyOverview,
    StudySpec,
)
from autosft.studies.wire import to_plain

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

__all__ = [
    "CheckpointRecord",
    "CheckpointScore",
    "Command",
    "CommandKind",
    "Direction",
    "Driver",
    "LeaseLostError",
    "MemoryObservation",
    "Records",
    "Removed",
    "StudyInUseError",
    "StudyOverview",
    "StudyRecords",
    "StudySpec",
    "default_storage_url",
    "open_records",
]

MAX_NAME_LENGTH = 200


def open_records(url: str) -> Records:
    """Open the study database at `url` (sqlite:///FILE or postgresql://…), creating or upgrading it.

    Before an upgrade, a SQLite file is backed up next to it.  Raises UserError for an invalid URL, a missing
    folder, a file that is read-only, corrupt or not ours, and a schema newer than this version supports;
    MissingExtraError if the driver of PostgreSQL is not installed.
    """
    parsed = parse_url(url)
    with readable_errors(parsed):
        engine = connect(parsed)
        upgrade(engine)
    return Records(engine)


class Records:
    """An open study database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reading=True)
        self._optuna_storage: RDBStorage | None = None

    @property
    def url(self) -> str:
        """The database's URL without its password, for display."""
        return display(self._engine.url)

    def close(self) -> None:
        self._engine.dispose()
        if self._optuna_storage is not None:
            self._optuna_storage.remove_session()
            self._optuna_storage.engine.dispose()

    def open_study(self, spec: StudySpec, *, now: float) -> StudyRecords:
        """Create the study, or resume the one of this name.

        Raises UserError that lists the differences if the stored study has another model, data, metric,
        evaluation, search space or seed, and if the name is empty or too long.
        """
        _check_name(spec.name)
        stored = self.find_study(spec.name)
        if stored is not None:
            _refuse_difference(stored, spec)
            spec = dataclasses.replace(spec, space=stored.space)
        else:
            refuse_foreign_study(self._optuna(), spec.name)
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            # Checked again under the lock: another process may be creating the same study.
            query = sa.select(tables.studies.c.id).where(tables.studies.c.name == spec.name)
            study_id = connection.scalar(query.with_for_update())
            if study_id is None:
                columns = {
                    "name": spec.name,
                    "spec": rows.dump(spec),
                    "num_trials": spec.num_trials,
                    "created_at": now,
                }
                inserted = connection.execute(sa.insert(tables.studies).values(columns)).inserted_primary_key
                assert inserted is not None
                study_id = int(inserted[0])
            else:
                this = tables.studies.c.id == study_id
                columns = {"spec": rows.dump(spec), "num_trials": spec.num_trials}
                connection.execute(sa.update(tables.studies).where(this).values(columns))
        return StudyRecords(self._engine, study_id=study_id, spec=spec, optuna=self._optuna)

    def find_study(self, name: str) -> StudySpec | None:
        """Return the spec of a stored study, None if there is none of this name."""
        with self._read() as connection:
            query = sa.select(tables.studies).where(tables.studies.c.name == name)
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else _spec_from(row)

    def read_study(self, name: str) -> StudyRecords:
        """Return a stored study for reading.  Raises UserError with the nearest names if there is none."""
        row = self._find(name)
        with readable_rows(self._engine.url):
            spec = _spec_from(row)
        return StudyRecords(self._engine, study_id=row["id"], spec=spec, optuna=self._optuna)

    def _find(self, name: str) -> sa.RowMapping:
        with self._read() as connection:
            query = sa.select(tables.studies).where(tables.studies.c.name == name)
            row = connection.execute(query).mappings().one_or_none()
            if row is not None:
                return row
            known = sorted(connection.scalars(sa.select(tables.studies.c.name)))
        nearest = difflib.get_close_matches(name, known, n=3) or known[:3]
        remedy = f"Did you mean {', '.join(nearest)}?" if nearest else "It holds no studies yet."
        raise UserError(f"There is no study named {name!r} in {self.url}.", remedy=remedy)

    def study_by_id(self, study_id: int) -> StudyRecords | None:
        """Return the stored study with this primary key for reading, None if it has been deleted."""
        with self._read() as connection:
            query = sa.select(tables.studies).where(tables.studies.c.id == study_id)
            row = connection.execute(query).mappings().one_or_none()
            spec = None if row is None else _spec_from(row)
        if spec is None:
            return None
        return StudyRecords(self._engine, study_id=study_id, spec=spec, optuna=self._optuna)

    def studies(self) -> tuple[StudyOverview, ...]:
        """Return all studies, newest first."""
        with self._read() as connection:
            studies = sa.select(tables.studies).order_by(tables.studies.c.created_at.desc())
            found = connection.execute(studies).mappings().all()
            columns = (tables.trials.c.study_id, tables.trials.c.state, tables.trials.c.value)
            trials = connection.execute(sa.select(*columns)).mappings().all()
            drivers = {row["id"]: row for row in connection.execute(sa.select(tables.drivers)).mappings()}
            return tuple(
                _overview(row, [trial for trial in trials if trial["study_id"] == row["id"]], drivers)
                for row in found
            )

    def trial_states(self, names: Collection[str]) -> dict[str, dict[int, tuple[str, float | None]]]:
        """Return state and value of each trial of these studies; cheap, for who looks often."""
        columns = (
            tables.studies.c.name,
            tables.trials.c.number,
            tables.trials.c.state,
            tables.trials.c.value,
        )
        both = tables.trials.join(tables.studies, tables.studies.c.id == tables.trials.c.study_id)
        query = sa.select(*columns).select_from(both)
        found: dict[str, dict[int, tuple[str, float | None]]] = {}
        with self._read() as connection:
            for row in connection.execute(query.where(tables.studies.c.name.in_(list(names)))):
                found.setdefault(row.name, {})[row.number] = row.state, row.value
        return found

    def overview(self, name: str) -> StudyOverview:
        """Return the line of one study.  Raises UserError with the nearest names if there is none."""
        row = self._find(name)
        with self._read() as connection:
            columns = (tables.trials.c.study_id, tables.trials.c.state, tables.trials.c.value)
            query = sa.select(*columns).where(tables.trials.c.study_id == row["id"])
            trials = connection.execute(query).mappings().all()
            this = tables.drivers.c.id == row["driver_id"]
            driver = connection.execute(sa.select(tables.drivers).where(this)).mappings().one_or_none()
            drivers = {} if driver is None else {driver["id"]: driver}
            return _overview(row, list(trials), drivers)

    def send_command(
        self,
        study: str,
        kind: CommandKind,
        *,
        trial: int | None = None,
        parameters: Parameters | None = None,
        now: float,
    ) -> int:
        """Leave a command for the process that runs `study`; return the command's id.

        Raises UserError if there is no such study.
        """
        columns = {
            "study_id": self._find(study)["id"],
            "kind": kind.value,
            "trial": trial,
            "parameters": rows.dump(dict(parameters or {})),
            "requested_at": now,
        }
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            inserted = connection.execute(sa.insert(tables.commands).values(columns)).inserted_primary_key
        assert inserted is not None
        return int(inserted[0])

    def rename_study(self, old: str, new: str, *, now: float) -> Path | None:
        """Rename a study and its folder; return the folder, None if it is not on this machine.

        Raises UserError if there is no such study, if it is running, and if the new name is invalid or taken.
        """
        _check_name(new)
        study = self.read_study(old)
        if self.find_study(new) is not None or find_optuna_study(self._optuna(), new) is not None:
            raise UserError(f"There is already a study named {new!r}.", remedy="Choose another name.")
        folder = folder_of(study.spec.output_dir, old)
        target = None if folder is None else folder.with_name(slug(new))
        if target is not None and target != folder and target.exists():
            raise UserError(f"{target} already exists.", remedy="Choose another name, or move it away.")
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            refuse_if_alive(connection, study.study_id, None, study=old, now=now)
            output_dir = study.spec.output_dir if target is None else str(target)
            rename_rows(connection, study.study_id, study.spec, name=new, output_dir=output_dir)
            if folder is not None and target is not None:
                folder.rename(target)  # last: an error here rolls the rows back
        return target

    def delete_study(self, name: str, *, now: float) -> Removed:
        """Delete a study: its rows in our tables and in Optuna's, and its files; nothing else.

        Raises UserError if there is no such study, and while it runs.  If killed halfway, calling it again
        completes it: Optuna's rows go first, then ours, then the files, which nothing refers to any more.
        """
        study = self.read_study(name)
        kept, url = study.checkpoints(), study.spec.store_url
        if url:
            remote.probe(url)  # before anything is deleted
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            refuse_if_alive(connection, study.study_id, None, study=name, now=now)
        storage = self._optuna()
        optuna_id = find_optuna_study(storage, name)
        if optuna_id is not None:
            storage.delete_study(optuna_id)
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            refuse_if_alive(connection, study.study_id, None, study=name, now=now)
            delete_rows(connection, study.study_id, name)
        here = [checkpoint.path for checkpoint in kept if not remote.is_url(checkpoint.path)]
        removed = remove_files(folder_of(study.spec.output_dir, name), here, study=name)
        there = [checkpoint for checkpoint in kept if remote.is_url(checkpoint.path)]
        for checkpoint in there:  # including those of an earlier --output
            remote.remove(checkpoint.path)
        if url:
            remote.remove_study(url)
        return dataclasses.replace(
            removed, num_bytes=removed.num_bytes + sum(checkpoint.num_bytes for checkpoint in there)
        )

    def memory_observations(self) -> tuple[MemoryObservation, ...]:
        """Return the observations of all studies, including deleted ones, oldest first."""
        table = tables.memory_observations
        with self._read() as connection:
            found = connection.execute(sa.select(table).order_by(table.c.id)).mappings()
            return tuple(rows.observation_from(row) for row in found)

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        url = self._engine.url
        with readable_errors(url), begin(self._reading) as connection, readable_rows(url):
            yield connection

    def _optuna(self) -> RDBStorage:
        """Return Optuna's storage, opened on first use: importing it takes most of a second."""
        if self._optuna_storage is None:
            self._optuna_storage = open_optuna(self._engine)
        return self._optuna_storage


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > MAX_NAME_LENGTH:
        raise UserError(
            f"A study's name has 1 to {MAX_NAME_LENGTH} characters; this one has {len(name)}.",
            remedy="Choose another with --study.",
        )


def _refuse_difference(stored: StudySpec, asked: StudySpec) -> None:
    """Refuse to mix two studies under one name; list the differences."""
    before, now = _identity(stored), _identity(asked)
    different = [name for name in now if before.get(name) != now[name]]
    if not different:
        return
    said = {name: (before.get(name, "none"), now[name]) for name in different}
    for name in ("model", "data"):  # compared by content, reported by location
        if name in said:
            said[name] = _said(stored, name), _said(asked, name)
    lines = [f"  {name}: was {was}, now {is_now}" for name, (was, is_now) in said.items()]
    raise UserError(
        f"Study {asked.name!r} exists with different inputs:\n" + "\n".join(lines),
        remedy="Start a new study with --study OTHER, or give the same inputs as before to resume it.",
    )


def _identity(spec: StudySpec) -> dict[str, str]:
    """Return everything a study's scores depend on, under the names that users know."""
    return {
        "metric": f"{spec.metric}, {spec.direction.value}",
        "model": spec.model_fingerprint,
        "data": spec.data_fingerprint,
        "seed": str(spec.seed),
        # the longest prompt and answer follow from the prompts
        **{
            name: str(_placeless(value))
            for name, value in to_plain(spec.pinned).items()
            if name != "generation"
        },
        **{name: str(value) for name, value in to_plain(spec.fixed).items() if name != "seed"},
        **{name: str(dimension) for name, dimension in spec.space.items},
    }


def _placeless(value: Any) -> Any:
    """Return a pinned value without the folder of a user's code, which is identified by its content."""
    return {key: one for key, one in value.items() if key != "folder"} if isinstance(value, dict) else value


def _said(spec: StudySpec, name: str) -> str:
    return f"{getattr(spec, name)} (sha256 {getattr(spec, f'{name}_fingerprint')[:12]})"


def _spec_from(row: sa.RowMapping) -> StudySpec:
    return dataclasses.replace(rows.load(StudySpec, row["spec"]), num_trials=row["num_trials"])


def _overview(
    row: sa.RowMapping, trials: list[sa.RowMapping], drivers: Mapping[int, sa.RowMapping]
) -> StudyOverview:
    spec = _spec_from(row)
    values = [
        trial["value"]
        for trial in trials
        if trial["value"] is not None and TrialState(trial["state"]) is not TrialState.INFEASIBLE
    ]
    driver = drivers.get(row["driver_id"])
    return StudyOverview(
        spec=spec,
        num_by_state=Counter(TrialState(trial["state"]) for trial in trials),
        best_value=None
        if not values
        else (min(values) if spec.direction is Direction.MINIMIZE else max(values)),
        created_at=row["created_at"],
        driver=None
        if driver is None
        else Driver(host=driver["host"], pid=driver["pid"], pid_started_at=driver["pid_started_at"]),
        heartbeat_at=None if driver is None else driver["heartbeat_at"],
    )
