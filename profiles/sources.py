"""Sources of models and data, paths or hub ids, and whether they still exist later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError


def full_path(source: str) -> str:
    """Return the absolute path of an existing file or folder; anything else unchanged.

    What is stored of a request (in a study, a checkpoint, an export) has to mean the same from any folder: a
    model's relative path would later be taken for a hub id.
    """
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else source  # noqa: PTH100 - links stay as they were named


def trained_in(source: str) -> str:
    """Return the last model in a folder of `autosft train --output`, a trial's only one; others as they are.

    Raises UserError for a trial that has kept several.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(
        (folder / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        return source
    kept = sorted(path for path in folder.glob("checkpoints/step-*") if path.is_dir())
    if len(kept) > 1 and not (folder / "run.json").exists():
        raise UserError(
            f"{source} holds {len(kept)} checkpoints of a run.",
            remedy=f"Give one of them, such as the last: {kept[-1]}",
        )
    return str(kept[-1]) if kept else source


def has_moved(source: str) -> bool:
    """Return whether a source is a path that no longer exists."""
    path = Path(source).expanduser()
    return path.is_absolute() and not path.exists()


def files_mark(source: str) -> str | None:
    """Return a sha256 of a model folder's config.json and its weight files' names and sizes, None without.

    Cheap: it detects another model, or one with other files, but not every change of a weight
    (`profiles.model.profile.load_model_profile` has a fingerprint that does).
    """
    folder = Path(source).expanduser()
    try:
        config = (folder / "config.json").read_bytes()
        weights = sorted(
            (path.name, path.stat().st_size)
            for path in folder.iterdir()
            if path.suffix in (".safetensors", ".bin") and "training_args" not in path.name
        )
    except OSError:
        return None
    return hashlib.sha256(config + json.dumps(weights).encode()).hexdigest()


def mark_in(environment: Any) -> str | None:
    """Return the `files_mark` in a study's or exported configuration's environment, None without one."""
    model = environment.get("model") if isinstance(environment, Mapping) else None
    return model.get("files") if isinstance(model, Mapping) else None


def require_base(source: str, mark: str | None, *, of: str) -> str:
    """Return the source of the model that something was trained from, if it still exists unchanged.

    `mark` is its `files_mark` at that time, None where it was not stored; `of` names what was trained.
    Raises UserError otherwise.
    """
    if has_moved(source):
        raise UserError(
            f"the model that {of} was trained from was in {source}, which no longer exists.",
            remedy="Move it back, or resume the study once with its new path: "
            "autosft tune --study NAME --model FOLDER ...",
        )
    if mark is not None and files_mark(source) not in (None, mark):
        raise UserError(
            f"{source} is not the model that {of} was trained from.",
            remedy="Put the original config.json and weights back.",
        )
    return source


def require_base_of_adapter(folder: Path) -> None:
    """Raise UserError if a folder holds an adapter whose base model no longer exists."""
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = values.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(base, str) and has_moved(base):
        raise UserError(
            f"the adapter in {folder} was trained on the model in {base}, which no longer exists.",
            remedy="Move it back, or set base_model_name_or_path in adapter_config.json to its new path.",
        )
