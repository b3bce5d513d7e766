"""Merge an adapter in a separate process, for callers that do not import torch."""

from __future__ import annotations

import subprocess
from pathlib import Path

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError

#: Exit code for a UserError, whose message and remedy are the last two lines of stderr.
REFUSED = 2


def merge_adapter(
    checkpoint: Path, output: Path, *, base: str, keep_zeros: bool, trust_remote_code: bool
) -> tuple[str, ...]:
    """Write an adapter into its base's weights and return what the user should know about the result.

    Raises UserError if the adapter cannot be merged, or the merged model is not equal to the adapted one.
    """
    done = subprocess.run(
        [
            *python("-m", "autosft.workers.tools.merge_adapter", str(checkpoint), str(output), base),
            *(["--keep-zeros"] if keep_zeros else []),
            *(["--trust-remote-code"] if trust_remote_code else []),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return tuple(line for line in done.stdout.splitlines() if line)
    lines = done.stderr.strip().splitlines() or ["it was killed, perhaps for lack of memory"]
    if done.returncode == REFUSED and len(lines) > 1:
        raise UserError(lines[-2], remedy=lines[-1])
    raise UserError(f"the adapter in {checkpoint} could not be merged: {lines[-1]}.")
