"""`--output URL`: what is stored there, what stays on this machine, and whether all nodes can access it.

Checkpoints, and a copy of the per-example measurements, go to the URL.  Logs, `best.yaml` and files being
written stay in a folder that has the same path on every node and need not be shared.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.own_folders import data_folder
from autosft.scheduler.cluster.nodes import ANSWER_S, Nodes
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import slug
from autosft.studies.files.study_folder import bring_here
from autosft.studies.values import StudySpec
from autosft.workers.runners.node import why_no_storage
from autosft.workers.training.remote_io import DATA_MARKER


def require_storage(url: str) -> None:
    """Check that files can be written, read and deleted at a URL from here.  Raises UserError."""
    if url.startswith("memory://"):
        raise UserError(
            f"--output {url}: this is the memory of one process, and each trial is a separate process.",
            remedy="Use a folder, or a bucket: s3://BUCKET/FOLDER.",
        )
    remote.probe(url)


def require_storage_on_nodes(nodes: Nodes, url: str, output: Path) -> None:
    """Raise UserError if another node cannot access a URL, or cannot write the study's folder."""
    names = nodes.other_nodes()
    asked = {node: nodes.on_node(node, why_no_storage, url, str(output)) for node in names}
    for node, answer in asked.items():
        if why := answer.result(ANSWER_S):
            raise UserError(
                f"node {names[node]} of the cluster: {why}",
                remedy="Every node needs the credentials and the storage's package.",
            )


def folder_here(url: str) -> Path:
    """Return this machine's folder for the studies at a URL: logs, best.yaml, files being written."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return data_folder() / "remote" / digest


def open_store(base: str, name: str, folder: Path, *, stored: StudySpec | None, prompts: Path | None) -> str:
    """Return a study's URL, after uploading its prompts there and downloading its trials' measurements.

    `folder` is the study's on this machine, `stored` its record in the database.  Raises StorageError.
    """
    url = store_url_of(base, name, stored)
    if prompts is not None:
        remote.put_file(prompts, f"{url}/{prompts.name}")
    bring_here(url, folder)
    return url


def store_url_of(base: str, name: str, stored: StudySpec | None) -> str:
    """Return a study's URL below the base: the one that it already has, else a new one.

    No two studies share one, so that none deletes another's checkpoints, even with different databases.
    """
    if stored is not None and stored.store_url.startswith(f"{base}/"):
        return stored.store_url
    return f"{base}/{slug(name)}-{secrets.token_hex(4)}"


def upload_data(data: PreparedData, base: str) -> str:
    """Return the URL of prepared data, after uploading it if it is missing there.  Raises StorageError."""
    url = f"{base}/.cache/{data.path.name}"
    if not remote.exists(url, marker=DATA_MARKER):
        remote.upload(data.path, url, marker=DATA_MARKER)
    return url
