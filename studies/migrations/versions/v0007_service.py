"""The service's queue: items, what happened to them, users and what they used, and who serves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    _items()
    op.create_table(
        "autosft_service_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["autosft_service_items.id"],
            name=op.f("fk_autosft_service_events_item_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_autosft_service_events")),
    )
    op.create_index(
        op.f("ix_autosft_service_events_item_id"), "autosft_service_events", ["item_id"], unique=False
    )
    op.create_table(
        "autosft_service_usage",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("device_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_autosft_service_usage")),
        sa.UniqueConstraint("owner", "hour", name=op.f("uq_autosft_service_usage_owner_hour")),
    )
    _users_and_servers()


def _items() -> None:
    op.create_table(
        "autosft_service_items",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("idempotency_key", sa.String(200)),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("submitted_at", sa.Double(), nullable=False),
        sa.Column("queued_at", sa.Double(), nullable=False),
        sa.Column("demand", sa.Text()),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer()),
        sa.Column("not_before", sa.Double()),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("may_share", sa.Boolean(), nullable=False),
        sa.Column("cloned_from", sa.Integer()),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("place", sa.Text()),
        sa.Column("launch", sa.String(64), nullable=False),
        sa.Column("process", sa.Text()),
        sa.Column("then", sa.String(16)),
        sa.Column("started_at", sa.Double()),
        sa.Column("ended_at", sa.Double()),
        sa.Column("num_starts", sa.Integer(), nullable=False),
        sa.Column("num_lost", sa.Integer(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("ends_at", sa.Double()),
        sa.Column("device_s", sa.Double(), nullable=False),
        sa.Column("charged_until", sa.Double()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_autosft_service_items")),
        sa.UniqueConstraint(
            "owner", "idempotency_key", name=op.f("uq_autosft_service_items_owner_idempotency_key")
        ),
    )
    op.create_index(op.f("ix_autosft_service_items_state"), "autosft_service_items", ["state"], unique=False)


def _users_and_servers() -> None:
    op.create_table(
        "autosft_service_users",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("shares", sa.Double(), nullable=False),
        sa.Column("max_devices", sa.Integer()),
        sa.Column("device_hours_a_week", sa.Double()),
        sa.Column("token_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_autosft_service_users")),
        sa.UniqueConstraint("name", name=op.f("uq_autosft_service_users_name")),
        sa.UniqueConstraint("token_sha256", name=op.f("uq_autosft_service_users_token_sha256")),
    )
    op.create_table(
        "autosft_service_servers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("process", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_autosft_service_servers")),
    )
