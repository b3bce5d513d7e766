"""How fast a trial was, beside its measured memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("autosft_memory_observations", sa.Column("measured_tokens_per_s", sa.Double()))
