"""Checks before training that the trained model will be exportable."""

from __future__ import annotations

from autosft.profiles.model.adapter_folder import base_of, is_adapter_folder
from autosft.profiles.model.gguf import plain_folder
from autosft.scheduler.events import Note, Observer
from autosft.workers.tools.gguf_converter import require_converter
from autosft.workers.tools.merge_process import run_tool


def require_exportable(to: str | None, source: str, *, trust_remote_code: bool, observe: Observer) -> None:
    """Raise UserError if `--export gguf` is given and models of this family are not exported correctly.

    Checked with a small model of the same configuration and random weights, once for each configuration and
    tokenizer.
    """
    if to is None:
        return
    require_converter()
    observe(Note(message="Trying to export a small model of this family as GGUF"))
    base = (base_of(source) if is_adapter_folder(source) else None) or source
    said = run_tool(
        "autosft.workers.tools.export_gguf",
        plain_folder(base, need_weights=False),
        "--family",
        *(["--trust-remote-code"] if trust_remote_code else []),
        failure=f"--export {to}: {source} could not be checked",
    )
    for line in said.splitlines() or ["The exported model is the same in llama.cpp."]:
        observe(Note(message=line))
