"""Run by alembic to apply the revisions in `versions`, inside the transaction that the caller has begun."""

from __future__ import annotations

from alembic import context

from autosft.studies.store.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
context.run_migrations()
