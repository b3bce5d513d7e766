"""Ids of the dashboard's artifacts, as stored in a study's attributes."""

from __future__ import annotations

import json

#: Artifacts of a trial: file name -> MIME type.  Ids are positions in it: append only.
KINDS = {
    "learning-curve.svg": "image/svg+xml",
    "memory.svg": "image/svg+xml",
    "configuration.yaml": "text/plain",
    "log.txt": "text/plain",
}
_PREFIX = "a5f7"  # the dashboard serves ids of hexadecimal digits and dashes only; uploads get UUIDs


def artifact_attributes(study_id: int, trial: int) -> dict[str, str]:
    """Return the system attributes that tell Optuna about the artifacts of a trial.

    Key and fields are those that `optuna.artifacts.upload_artifact` writes.
    """
    attributes = {}
    for kind, (name, mimetype) in enumerate(KINDS.items()):
        artifact_id = f"{_PREFIX}-{study_id:x}-{trial:x}-{kind:x}"
        meta = {"artifact_id": artifact_id, "filename": name, "mimetype": mimetype, "encoding": None}
        attributes[f"artifacts:{artifact_id}"] = json.dumps(meta)
    return attributes
