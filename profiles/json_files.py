"""Read JSON objects from untrusted files, with a size limit and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError

#: Larger than any configuration or index of libraries: an index of a thousand shards has about 10 MB.
MAX_BYTES = 64 << 20


def read_json_object(path: Path, *, remedy: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises UserError for a file that cannot be read, is larger than `max_bytes`, or does not contain an
    object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", remedy=remedy) from error
    if len(content) > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes >> 20} MiB.", remedy=remedy)
    return parse_json_object(content, name=str(path), remedy=remedy)


def parse_json_object(content: bytes, *, name: str, remedy: str) -> dict[str, Any]:
    """Return the object in JSON text.  Raises UserError with `name` for anything else."""
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:  # nested too deeply, integers too long
        said = str(error) or type(error).__name__
        raise UserError(f"{name} cannot be read: {said[:200]}.", remedy=remedy) from None
    if not isinstance(values, dict):
        raise UserError(f"{name} holds no JSON object.", remedy=remedy)
    return values
