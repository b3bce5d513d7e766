"""Scores of checkpoints on fresh examples; temperature and throttling of GPUs beside measurements."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("autosft_measurements", sa.Column("temperature_c", sa.Double(), nullable=True))
    op.add_column("autosft_measurements", sa.Column("throttle_reasons", sa.Text(), nullable=True))
    op.create_table(
        "autosft_scores",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("examples", sa.String(length=200), nullable=False),
        sa.Column("metric", sa.String(length=200), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("num_examples", sa.Integer(), nullable=True),
        sa.Column("recorded_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["autosft_trials.id"], name=op.f("fk_autosft_scores_trial_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_autosft_scores")),
        sa.UniqueConstraint(
            "trial_id",
            "step",
            "examples",
            "metric",
            name=op.f("uq_autosft_scores_trial_id_step_examples_metric"),
        ),
    )
