"""Fingerprint a weight file's content without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_BYTES = 64 * 2**20
_SAMPLE_BYTES = 2**20
_NUM_SAMPLES = 16


def content_mark(path: Path) -> str:
    """Return size and sha256 of a weight file's content, sampled for large ones."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256(str(size_bytes).encode())
    with path.open("rb") as file:
        if size_bytes <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(_NUM_SAMPLES):
                file.seek(number * (size_bytes - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
