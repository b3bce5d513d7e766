"""Which process a driver is, by what no clock changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("autosft_drivers", sa.Column("boot_id", sa.Text()))
    op.add_column("autosft_drivers", sa.Column("start_ticks", sa.BigInteger()))
