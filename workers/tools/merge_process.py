"""Write models in a separate process, for callers that do not import torch."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError

#: Exit code for a UserError, whose message and remedy are the last two lines of stderr.
REFUSED = 2
#: How long a process may take to end when this one is stopped.
_GRACE_S = 10.0


def merge_adapter(
    checkpoint: Path,
    output: Path,
    *,
    base: str,
    keep_zeros: bool,
    trust_remote_code: bool,
    dtype: str | None = None,
) -> tuple[str, ...]:
    """Write an adapter into its base's weights and return what the user should know about the result.

    In `dtype`, by default that of the base's weights.  Raises UserError if the adapter cannot be merged, or
    the merged model is not equal to the adapted one.
    """
    return _write(
        checkpoint,
        output,
        "--base",
        base,
        *(["--dtype", dtype] if dtype is not None else []),
        *(["--keep-zeros"] if keep_zeros else []),
        *(["--trust-remote-code"] if trust_remote_code else []),
        failure=f"the adapter in {checkpoint} could not be merged",
    )


def write_model(checkpoint: Path, output: Path, *, dtype: str, trust_remote_code: bool) -> tuple[str, ...]:
    """Write a whole model in another dtype and return what the user should know about the result.

    Raises UserError if what was written is not equal to the model.
    """
    return _write(
        checkpoint,
        output,
        "--dtype",
        dtype,
        *(["--trust-remote-code"] if trust_remote_code else []),
        failure=f"the model in {checkpoint} could not be written as {dtype}",
    )


def _write(checkpoint: Path, output: Path, *arguments: str, failure: str) -> tuple[str, ...]:
    module = "autosft.workers.tools.merge_adapter"
    return tuple(run_tool(module, str(checkpoint), str(output), *arguments, failure=failure).splitlines())


def run_tool(module: str, *arguments: str, failure: str) -> str:
    """Run a module of autosft in a separate process and return what it printed, without empty lines.

    Raises the process's own UserError, or one that begins with `failure` if it failed otherwise.
    """
    with subprocess.Popen(
        python("-m", module, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            told, errors = process.communicate()
        except BaseException:  # Ctrl+C or SIGTERM: its unfinished files are its own to remove
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GRACE_S)
            process.kill()
            raise
    if process.returncode == 0:
        return "\n".join(line for line in told.splitlines() if line)
    lines = errors.strip().splitlines() or ["it was killed, perhaps for lack of memory"]
    if process.returncode == REFUSED and len(lines) > 1:
        raise UserError(lines[-2], remedy=lines[-1])
    if process.returncode == REFUSED:
        raise UserError(lines[-1])
    raise UserError(f"{failure}: {lines[-1]}.")
