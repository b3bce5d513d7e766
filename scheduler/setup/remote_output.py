"""`--output URL`: what of a study goes there, what stays on this machine, and whether all nodes reach it.

Checkpoints, and a copy of what is measured example by example, go to the URL.  Logs, `best.yaml` and what
is being written stay in a folder that every node has under the same name, and that need not be shared.
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
    """Raise UserError unless files can be written to a URL from here, read and deleted again."""
    if url.startswith("memory://"):
        raise UserError(
            f"--output {url}: that is the memory of one process, and each trial is a process of its own.",
            remedy="Use a folder, or a bucket: s3://BUCKET/FOLDER.",
        )
    remote.probe(url)


def require_storage_on_nodes(nodes: Nodes, url: str, output: Path) -> None:
    """Raise UserError where another node cannot reach a URL, or cannot write the study's folder."""
    names = nodes.other_nodes()
    asked = {node: nodes.on_node(node, why_no_storage, url, str(output)) for node in names}
    for node, answer in asked.items():
        if why := answer.result(ANSWER_S):
            raise UserError(
                f"node {names[node]} of the cluster: {why}",
                remedy="Every node needs the credentials and the storage's package.",
            )


def folder_here(url: str) -> Path:
    """Return the folder of this machine for the studies at a URL: logs, best.yaml, what is being written."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return data_folder() / "remote" / digest


def open_store(base: str, name: str, folder: Path, *, stored: StudySpec | None, prompts: Path | None) -> str:
    """Return a study's own URL, with its prompts there, and what trials have measured there fetched.

    `folder` is the study's on this machine, `stored` what the database has of it.  Raises StorageError.
    """
    url = store_url_of(base, name, stored)
    if prompts is not None:
        remote.put_file(prompts, f"{url}/{prompts.name}")
    bring_here(url, folder)
    return url


def store_url_of(base: str, name: str, stored: StudySpec | None) -> str:
    """Return a study's own URL below the base: the one that it has already, else a new one.

    No two studies have the same, so that none deletes another's checkpoints, even with different databases.
    """
    if stored is not None and stored.store_url.startswith(f"{base}/"):
        return stored.store_url
    return f"{base}/{slug(name)}-{secrets.token_hex(4)}"


def upload_data(data: PreparedData, base: str) -> str:
    """Return the URL of prepared data, after uploading it unless it is there.  Raises StorageError."""
    url = f"{base}/.cache/{data.path.name}"
    if not remote.exists(url, marker=DATA_MARKER):
        remote.upload(data.path, url, marker=DATA_MARKER)
    return url
