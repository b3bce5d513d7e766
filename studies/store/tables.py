"""Our tables in the study database.  Optuna's tables are next to them and never touched from here.

Times are UNIX seconds; JSON columns hold what `autosft.studies.wire` writes.  A change here needs a new file
in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

VERSION_TABLE = "autosft_version"  # Optuna owns alembic's default, alembic_version

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, primary_key=True)


def _of(table: str, **options: Any) -> sa.Column[int]:
    """Return a reference to a row of `table` that is deleted with it."""
    target = sa.ForeignKey(f"autosft_{table}.id", ondelete="CASCADE")
    return sa.Column(f"{_SINGULAR[table]}_id", sa.Integer, target, nullable=False, **options)


_SINGULAR = {
    "studies": "study",
    "trials": "trial",
    "attempts": "attempt",
    "service_items": "item",
}

studies = sa.Table(
    "autosft_studies",
    metadata,
    _id(),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("spec", sa.Text, nullable=False),  # JSON of StudySpec
    sa.Column("num_trials", sa.Integer, nullable=False),  # requested; may grow from run to run
    sa.Column("created_at", sa.Double, nullable=False),
    # The running driver, None if it has released the study: guards every write (StudyRecords).
    sa.Column("driver_id", sa.Integer),
)

drivers = sa.Table(  # one row for each time that a process took over a study
    "autosft_drivers",
    metadata,
    _id(),
    _of("studies", index=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("pid_started_at", sa.Double, nullable=False),
    sa.Column("boot_id", sa.Text),  # with start_ticks, which process it is, whatever the clock does
    sa.Column("start_ticks", sa.BigInteger),  # since the boot; None of earlier versions, and where unknown
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("heartbeat_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),  # None: it is running, or it died
    sa.Column("environment", sa.Text, nullable=False),  # JSON: hardware, versions, git state of this run
)

queue = sa.Table(  # parameters to try before the sampler is asked
    "autosft_queue",
    metadata,
    _id(),
    _of("studies", index=True),
    sa.Column("parameters", sa.Text, nullable=False),  # JSON, complete
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("enqueued_at", sa.Double, nullable=False),
    sa.Column("trial", sa.Integer),  # number of the trial that it became; None while it waits
)

trials = sa.Table(
    "autosft_trials",
    metadata,
    _id(),
    _of("studies"),
    sa.Column("number", sa.Integer, nullable=False),  # from 0
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("parameters", sa.Text, nullable=False),  # JSON, as sampled
    sa.Column("settings", sa.Text, nullable=False),  # JSON of TrainingSettings
    sa.Column("plan", sa.Text),  # JSON of the last attempt's ExecutionPlan
    sa.Column("num_attempts", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("best_step", sa.Integer),
    sa.Column("best_checkpoint", sa.Text),
    sa.Column("failure", sa.String(32)),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("asked_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.UniqueConstraint("study_id", "number"),
)

attempts = sa.Table(
    "autosft_attempts",
    metadata,
    _id(),
    _of("trials"),
    sa.Column("number", sa.Integer, nullable=False),  # from 1
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("device_uuids", sa.Text, nullable=False),  # JSON list
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),  # None while it runs
    # How it ended: "completed", a StopReason, a FailureKind, or "abandoned" with its driver.
    sa.Column("outcome", sa.String(32)),
    sa.Column("message", sa.Text),
    sa.Column("log_path", sa.Text),
    sa.Column("peak_allocated_bytes", sa.BigInteger),
    sa.Column("peak_reserved_bytes", sa.BigInteger),
    sa.Column("duration_s", sa.Double),
    sa.Column("eval_fingerprint", sa.Text),
    sa.UniqueConstraint("trial_id", "number"),
)

measurements = sa.Table(
    "autosft_measurements",
    metadata,
    _id(),
    _of("attempts"),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("evaluation", sa.Integer, nullable=False),  # 0 for a progress report
    sa.Column("num_steps", sa.Integer, nullable=False),
    sa.Column("num_tokens", sa.BigInteger, nullable=False),
    sa.Column("loss", sa.Double),
    sa.Column("grad_norm", sa.Double),
    sa.Column("learning_rate", sa.Double),
    sa.Column("tokens_per_s", sa.Double),
    sa.Column("peak_allocated_bytes", sa.BigInteger),
    sa.Column("peak_reserved_bytes", sa.BigInteger),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON
    sa.Column("checkpoint", sa.Text),
    sa.Column("elapsed_s", sa.Double, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.Column("temperature_c", sa.Double),  # of the hottest GPU; None without one
    sa.Column("throttle_reasons", sa.Text),  # JSON list of texts; None without a GPU
    sa.UniqueConstraint("attempt_id", "step", "evaluation"),
)

checkpoints = sa.Table(
    "autosft_checkpoints",
    metadata,
    _id(),
    _of("trials", index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("evaluation", sa.Integer),
    sa.Column("value", sa.Double),
    sa.Column("path", sa.Text, nullable=False, unique=True),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("has_resume_state", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

scores = sa.Table(  # of checkpoints, on examples other than those that trials are compared on
    "autosft_scores",
    metadata,
    _id(),
    _of("trials"),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("examples", sa.String(200), nullable=False),  # "final", or a data set or task by name
    sa.Column("metric", sa.String(200), nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("low", sa.Double),
    sa.Column("high", sa.Double),
    sa.Column("num_examples", sa.Integer),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.UniqueConstraint("trial_id", "step", "examples", "metric"),
)

untuned = sa.Table(  # the model before any tuning, on the examples that trials are compared on
    "autosft_untuned",
    metadata,
    _id(),
    _of("studies"),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON
    sa.Column("duration_s", sa.Double, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.UniqueConstraint("study_id"),
)

advice = sa.Table(  # what was noticed while a trial ran: studies.advice
    "autosft_advice",
    metadata,
    _id(),
    _of("trials"),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("cause", sa.String(32), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.UniqueConstraint("trial_id", "cause"),
)

commands = sa.Table(  # user commands, left by other processes for the driver
    "autosft_commands",
    metadata,
    _id(),
    _of("studies", index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("trial", sa.Integer),
    sa.Column("parameters", sa.Text, nullable=False),  # JSON
    sa.Column("requested_at", sa.Double, nullable=False),
    sa.Column("done_at", sa.Double),
)

# Deliberately without a reference to a study: measurements remain true when a study is deleted.
memory_observations = sa.Table(
    "autosft_memory_observations",
    metadata,
    _id(),
    sa.Column("study", sa.Text, nullable=False),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("model_fingerprint", sa.Text, nullable=False),
    sa.Column("device_name", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),  # JSON of TrainingSettings
    sa.Column("pinned", sa.Text, nullable=False),  # JSON of PinnedSettings
    sa.Column("plan", sa.Text, nullable=False),  # JSON of ExecutionPlan, the estimate in it
    sa.Column("measured_allocated_bytes", sa.BigInteger),
    sa.Column("measured_reserved_bytes", sa.BigInteger),
    sa.Column("out_of_memory", sa.Boolean, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.Column("measured_tokens_per_s", sa.Double),  # None if it shared its device, or was too short
    sa.UniqueConstraint("study", "trial", "attempt"),
)

# The service's queue (autosft.service.store).

service_items = sa.Table(
    "autosft_service_items",
    metadata,
    _id(),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("idempotency_key", sa.String(200)),
    sa.Column("arguments", sa.Text, nullable=False),  # JSON of Arguments
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("submitted_at", sa.Double, nullable=False),
    sa.Column("queued_at", sa.Double, nullable=False),
    sa.Column("demand", sa.Text),  # JSON of Demand, None until it is planned
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("rank", sa.Integer),
    sa.Column("not_before", sa.Double),
    sa.Column("after", sa.Text, nullable=False),  # JSON list of ids
    sa.Column("may_share", sa.Boolean, nullable=False),
    sa.Column("cloned_from", sa.Integer),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("place", sa.Text),  # JSON of Place, while it is placed
    sa.Column("launch", sa.String(64), nullable=False),
    sa.Column("process", sa.Text),  # JSON of Driver, while it runs
    sa.Column("then", sa.String(16)),
    sa.Column("started_at", sa.Double),
    sa.Column("ended_at", sa.Double),
    sa.Column("num_starts", sa.Integer, nullable=False),
    sa.Column("num_lost", sa.Integer, nullable=False),
    sa.Column("progress", sa.Double, nullable=False),
    sa.Column("ends_at", sa.Double),
    sa.Column("device_s", sa.Double, nullable=False),
    sa.Column("charged_until", sa.Double),
    sa.UniqueConstraint("owner", "idempotency_key"),
)

service_events = sa.Table(  # transitions of items, in the order in which they happened
    "autosft_service_events",
    metadata,
    _id(),
    _of("service_items", index=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

service_usage = sa.Table(  # device-seconds by user and hour
    "autosft_service_usage",
    metadata,
    _id(),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("hour", sa.Integer, nullable=False),  # since 1970
    sa.Column("device_s", sa.Double, nullable=False),
    sa.UniqueConstraint("owner", "hour"),
)

service_users = sa.Table(
    "autosft_service_users",
    metadata,
    _id(),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("shares", sa.Double, nullable=False),
    sa.Column("max_devices", sa.Integer),
    sa.Column("device_hours_a_week", sa.Double),
    sa.Column("token_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
)

service_servers = sa.Table(  # at most one row: who runs the queue, or ran it last
    "autosft_service_servers",
    metadata,
    _id(),
    sa.Column("generation", sa.Integer, nullable=False),  # counts the times that a server took over
    sa.Column("process", sa.Text, nullable=False),  # JSON of Driver
    sa.Column("url", sa.Text, nullable=False),  # where it answers, "" while it does not
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("heartbeat_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
)
