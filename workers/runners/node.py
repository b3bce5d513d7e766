"""What the driver asks each node of a cluster; `scheduler.cluster` runs these functions as Ray tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.benchmark import with_measured_rates
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.discover import profile_hardware
from autosft.studies.files import remote

#: `--hardware` for one node: set it in the raylet's environment to offer other devices than those found.
HARDWARE_VARIABLE = "AUTOSFT_HARDWARE"


def profile_this_node() -> ClusterProfile:
    """Return this node's devices, with the rates measured on it earlier."""
    return with_measured_rates(profile_hardware(os.environ.get(HARDWARE_VARIABLE, "auto")))


def missing_here(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the paths that do not exist on this node."""
    return tuple(path for path in paths if not Path(path).exists())


def why_no_storage(url: str, folder: str) -> str:
    """Return why this node cannot store checkpoints at a URL or write to `folder`, "" if it can."""
    try:
        remote.probe(url)
        Path(folder).mkdir(parents=True, exist_ok=True)
    except UserError as error:
        return f"{error.message} {error.remedy}"
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})."
    return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to."
