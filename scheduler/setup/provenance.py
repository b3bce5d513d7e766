"""Provenance of a study: versions and the state of the code."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from typing import Any

from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.sources import files_mark
from autosft.studies.request import TuneRequest
from autosft.studies.wire import to_plain


def environment(hardware: ClusterProfile, request: TuneRequest, model: ModelProfile) -> dict[str, Any]:
    """Return the request and everything else that results may depend on: hardware, versions, code."""
    packages = ("autosft", "torch", "transformers", "trl", "peft", "accelerate", "optuna", "ray")
    return {
        "goal": request.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"notify", "storage"},  # they may contain secrets
        ),
        "model": {
            "architecture": model.architecture,
            "num_parameters": model.num_parameters,
            "files": files_mark(model.source),
        },
        "hardware": to_plain(hardware),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit and whether files are changed, if autosft runs inside a git checkout."""
    try:
        commit, changed = (
            subprocess.run(  # nosec B607 - the git that the user has
                ["git", *command], capture_output=True, text=True, check=False, timeout=5
            )
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "is_changed": bool(changed.stdout.strip())}
