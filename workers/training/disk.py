"""Check that a checkpoint fits on the disk before it is written, so that the disk never gets full."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

#: Bytes left free besides a checkpoint: for logs, losses per example and the database.
RESERVE_BYTES = 32 << 20


class DiskFullError(OSError):
    """The disk has no room for a checkpoint."""


def require_room(folder: Path, model: Any, optimizer: Any, *, with_resume_state: bool) -> None:
    """Raise DiskFullError unless a checkpoint of this model and optimizer fits on the disk of `folder`.

    Counts the model's parameters (with an adapter: the trained ones) and the optimizer's current tensors.
    """
    parameters = list(model.parameters())
    is_adapter = hasattr(model, "peft_config")
    needed = sum(
        parameter.numel() * parameter.element_size()
        for parameter in parameters
        if parameter.requires_grad or not is_adapter
    )
    if with_resume_state and optimizer is not None:
        for state in optimizer.state.values():
            tensors = (item for item in state.values() if hasattr(item, "element_size"))
            needed += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE_BYTES:
        message = f"a checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free"
        raise DiskFullError(errno.ENOSPC, message, str(folder))


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception means a full disk or quota; C++ and Rust libraries only give a message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "Disk quota exceeded"))
