"""Renaming and deleting studies: their rows in our tables and in Optuna's."""

from __future__ import annotations

import dataclasses
import json
import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.studies.store import rows, tables
from autosft.studies.values import StudySpec

#: Columns that hold paths below a study's folder, and the condition that selects a study's rows.
_TRIALS_OF_STUDY = "SELECT id FROM autosft_trials WHERE study_id = :study_id"
_PATHS = {
    ("autosft_trials", "best_checkpoint"): "study_id = :study_id",
    ("autosft_checkpoints", "path"): f"trial_id IN ({_TRIALS_OF_STUDY})",
    ("autosft_attempts", "log_path"): f"trial_id IN ({_TRIALS_OF_STUDY})",
    ("autosft_measurements", "checkpoint"): (
        f"attempt_id IN (SELECT id FROM autosft_attempts WHERE trial_id IN ({_TRIALS_OF_STUDY}))"
    ),
}


def rename_rows(
    connection: Connection, study_id: int, spec: StudySpec, *, name: str, output_dir: str
) -> None:
    """Rename a study and its folder in our tables and in Optuna's.

    Optuna has no function to rename a study, so its tables, which are in the same database, are changed in
    the same transaction.
    """
    this = tables.studies.c.id == study_id
    renamed = dataclasses.replace(spec, name=name, output_dir=output_dir)
    connection.execute(sa.update(tables.studies).where(this).values(name=name, spec=rows.dump(renamed)))
    observed = tables.memory_observations.c.study == spec.name
    connection.execute(sa.update(tables.memory_observations).where(observed).values(study=name))
    names = {"old": spec.name, "new": name}
    connection.execute(sa.text("UPDATE studies SET study_name = :new WHERE study_name = :old"), names)
    if output_dir == spec.output_dir:
        return
    old, new = f"{spec.output_dir}/", f"{output_dir}/"
    for (table, column), belongs in _PATHS.items():
        moved = f"""
            UPDATE {table} SET {column} = :new || substr({column}, :skip)
            WHERE {belongs} AND substr({column}, 1, :length) = :old
        """
        values = {"study_id": study_id, "old": old, "new": new, "length": len(old), "skip": len(old) + 1}
        connection.execute(sa.text(moved), values)
    in_json = {"name": name, "old": json.dumps(old)[1:-1], "new": json.dumps(new)[1:-1]}
    shown = """
        UPDATE trial_user_attributes SET value_json = replace(value_json, :old, :new)
        WHERE trial_id IN (SELECT trial_id FROM trials WHERE study_id IN
            (SELECT study_id FROM studies WHERE study_name = :name))
    """
    connection.execute(sa.text(shown), in_json)


def delete_rows(connection: Connection, study_id: int, name: str) -> None:
    """Delete a study from our tables.

    Its memory observations stay, since measurements remain true, under another name, so that a later study of
    the same name can add its own.
    """
    observed = tables.memory_observations.c.study == name
    gone = f"{name} (deleted, {secrets.token_hex(4)})"
    connection.execute(sa.update(tables.memory_observations).where(observed).values(study=gone))
    connection.execute(sa.delete(tables.studies).where(tables.studies.c.id == study_id))
