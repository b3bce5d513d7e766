"""`--output URL`: what of a study goes to the URL, what stays on this machine, and that all nodes reach it.

Checkpoints, and a copy of what is measured example by example, go to the URL.  Logs, `best.yaml` and what
is being written stay in a folder that every node has under one name, and that need not be shared.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import platformdirs

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.scheduler.cluster.nodes import ANSWER_S, Nodes
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import slug
from autosft.studies.values import StudySpec
from autosft.workers.runners.node import why_no_storage
from autosft.workers.training.remote_io import DATA_MARKER


def require_storage(url: str) -> None:
    """Raise UserError unless what is written to a URL from here can be read and deleted again."""
    if url.startswith("memory://"):
        raise UserError(
            f"--output {url}: that is the memory of one process, and every trial is a process.",
            remedy="Use a folder, or a bucket: s3://BUCKET/FOLDER.",
        )
    remote.probe(url)


def require_storage_on_nodes(nodes: Nodes, url: str, output: Path) -> None:
    """Raise UserError where another node does not reach a URL, or cannot write the study's own folder."""
    names = nodes.other_nodes()
    asked = {node: nodes.on_node(node, why_no_storage, url, str(output)) for node in names}
    for node, answer in asked.items():
        if why := answer.result(ANSWER_S):
            raise UserError(
                f"node {names[node]} of the cluster: {why}",
                remedy="Credentials and the storage's package have to be on every node.",
            )


def folder_here(url: str) -> Path:
    """Return the folder of this machine for the studies at a URL: logs, best.yaml, what is being written."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return Path(platformdirs.user_data_dir("autosft")) / "remote" / digest


def store_url_of(base: str, name: str, stored: StudySpec | None) -> str:
    """Return a study's own place below a URL: the one that it has there already, else a new one.

    No two studies have the same, so that none deletes another's checkpoints, whichever database knows it.
    """
    if stored is not None and stored.store_url.startswith(f"{base}/"):
        return stored.store_url
    return f"{base}/{slug(name)}-{secrets.token_hex(4)}"


def shared_data(data: PreparedData, base: str) -> str:
    """Return the URL of prepared data, to which it is uploaded unless it is there.  Raises StorageError."""
    url = f"{base}/.cache/{data.path.name}"
    if not remote.exists(url, marker=DATA_MARKER):
        remote.upload(data.path, url, marker=DATA_MARKER)
    return url
