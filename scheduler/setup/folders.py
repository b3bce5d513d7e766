"""The locations of a study's files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.own_folders import data_folder
from autosft.scheduler.cluster.nodes import require_everywhere
from autosft.scheduler.cluster.ray_cluster import Cluster
from autosft.scheduler.setup.remote_output import folder_here, require_storage_on_nodes
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import slug
from autosft.studies.request import TuneRequest
from autosft.studies.store.database import parse_url


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFiles:
    """The locations of a study's files."""

    folder: Path  # on this machine: logs, best.yaml, and checkpoints unless they are at a URL
    data_dir: str  # prepared data: a folder, or its URL
    store_url: str | None  # of this study, if --output is a URL


def shared_cache(request: TuneRequest) -> Path:
    """Return the folder of prepared data that all nodes of a cluster read: next to the studies."""
    return output_base(request) / ".cache"


def require_shared(
    cluster: Cluster, storage_url: str, request: TuneRequest, *, output: Path, data: PreparedData
) -> None:
    """Raise UserError if another node of the cluster lacks files that its trials read or write.

    Only the driver writes the database; but a database in a local file is lost with its machine, and a job
    that is submitted again may start on another one.
    """
    database = parse_url(storage_url)
    if database.get_backend_name() == "sqlite":
        require_everywhere(
            cluster,
            {"--storage": Path(database.database or "").parent},
            remedy="Use --storage postgresql://USER@HOST/DATABASE, or a file in a shared folder.",
        )
    inputs = {"--output": output, "the prepared data": data.path}
    if (base_url := output_url(request)) is not None:
        require_storage_on_nodes(cluster, base_url, output)
        inputs = {}
    if request.model is not None and Path(request.model).exists():
        inputs["--model"] = Path(request.model).absolute()
    require_everywhere(cluster, inputs, remedy="Use shared folders, with the same path on all nodes.")


def output_base(request: TuneRequest) -> Path:
    if (url := output_url(request)) is not None:
        return folder_here(url)
    base = Path(request.output or data_folder() / "studies")
    return base.expanduser().resolve()


def output_url(request: TuneRequest) -> str | None:
    """Return the URL of `--output`, None if it is a folder."""
    return request.output if request.output is not None and remote.is_url(request.output) else None


def folder_of_study(request: TuneRequest, study: str) -> Path:
    """Return the study's folder on this machine, which need not exist."""
    return output_base(request) / slug(study)


def output_folder(request: TuneRequest, study: str) -> Path:
    """Return the study's folder on this machine, created and writable.  Raises UserError."""
    base, folder = output_base(request), folder_of_study(request, study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {base}: cannot be written to ({error.strerror}).", remedy="Choose another folder."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {base}: cannot be written to.", remedy="Choose another folder.")
    return folder
