"""`autosft export` for programs that serve a model or an adapter: llama.cpp and Ollama (GGUF), and vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG, base_of, is_adapter_folder, read_config
from autosft.profiles.model.adapters import HARMLESS_STARTS
from autosft.profiles.model.gguf import is_gguf, plain_folder
from autosft.scheduler.finish.export import Exported, make_folder
from autosft.scheduler.finish.weights import TORCH_DTYPES, Weights, merged, write_weights
from autosft.studies.export.writing import write_text
from autosft.studies.files.checkpoints import slug, verify_if_sealed
from autosft.workers.tools.gguf_converter import ADAPTERS, require_converter
from autosft.workers.tools.merge_process import run_tool
from autosft.workers.tools.scratch import scratch_folder

#: Permitted values of vLLM's --max-lora-rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_served(
    weights: Weights, to: str, output: Path, *, merge: bool = False, dtype: str | None = None
) -> Exported:
    """Export weights in one of this module's formats.  Raises UserError."""
    if to == "gguf":
        return export_for_gguf(weights, output, dtype=dtype)
    if to == "gguf-adapter":
        return export_adapter_for_gguf(weights, output, dtype=dtype)
    return export_for_vllm(weights, output, merge=merge, dtype=dtype)


def export_for_gguf(weights: Weights, output: Path, *, dtype: str | None = None) -> Exported:
    """Write NAME.gguf and a Modelfile into a new folder; an adapter is merged into its base first.

    `dtype` is that of the file, by default that of the base's weights.  Raises UserError if the converter is
    missing, and if the model differs in llama.cpp: then nothing is left in the folder.
    """
    require_converter()
    dtype = dtype or _gguf_dtype(weights.dtype)
    verify_if_sealed(weights.checkpoint)
    make_folder(output, must_be_empty=True)
    file = output / f"{weights.name}.gguf"
    notes: tuple[str, ...] = ()
    try:
        with scratch_folder(output, ".merged-") as scratch:
            source = weights.checkpoint
            if weights.is_adapter:
                source = scratch / "model"
                notes = merged(weights, source, dtype=TORCH_DTYPES.get(dtype))
            said = run_tool(
                "autosft.workers.tools.export_gguf",
                str(source),
                str(file),
                dtype,
                *(["--base", weights.base] if weights.base is not None else []),
                *(["--trust-remote-code"] if weights.trust_remote_code else []),
                failure=f"{weights.checkpoint} could not be written as GGUF",
            )
    except BaseException:
        for path in (file, output / "Modelfile"):
            path.unlink(missing_ok=True)
        raise
    name = shlex.quote(weights.name)
    return Exported(
        folder=output,
        command=f"ollama create {name} -f {shlex.quote(str(output / 'Modelfile'))}",
        notes=(*notes, *said.splitlines(), f"llama.cpp: llama-server -m {shlex.quote(str(file))} --jinja"),
    )


def export_adapter_for_gguf(weights: Weights, output: Path, *, dtype: str | None = None) -> Exported:
    """Write NAME-adapter.gguf into a new folder: a LoRA adapter alone, which llama.cpp applies to its base.

    In `dtype`, by default f32, as it was trained.  Raises UserError if the converter is missing, and for an
    adapter that llama.cpp would not apply as it was trained: then nothing is left in the folder.
    """
    require_converter(ADAPTERS)
    verify_if_sealed(weights.checkpoint)
    require_lora_alone(weights)
    make_folder(output, must_be_empty=True)
    file, template = output / f"{weights.name}-adapter.gguf", output / "chat_template.jinja"
    assert weights.base is not None
    base = base_of(weights.base) if is_adapter_folder(weights.base) else None
    base = base or weights.base
    try:
        said = run_tool(
            "autosft.workers.tools.export_gguf_adapter",
            *(str(weights.checkpoint), str(file), dtype or "f32", base),
            *(["--trust-remote-code"] if weights.trust_remote_code else []),
            failure=f"{weights.checkpoint} could not be written as GGUF",
        )
    except BaseException:
        for path in (file, template):
            path.unlink(missing_ok=True)
        raise
    notes = tuple(said.splitlines())
    if not is_gguf(base):
        made = Path(f"{output}-base")
        wanted = shlex.join(["autosft", "export", base, "--format", "gguf", "--output", str(made)])
        notes += (f"The base as GGUF: {wanted}",)
        base = str(made / f"{slug(Path(base).name)}.gguf")
    own = ["--chat-template-file", str(template)] if template.is_file() else []
    return Exported(
        folder=output,
        command=shlex.join(["llama-server", "-m", base, "--lora", str(file), "--jinja", *own]),
        notes=notes,
    )


def require_lora_alone(weights: Weights) -> None:
    """Raise UserError for an adapter that is more than factors on layers: llama.cpp drops the rest."""
    remedy = "Use --format gguf, which merges an adapter into its base."
    if not weights.is_adapter:
        raise UserError("--format gguf-adapter: all weights were trained.", remedy="Use --format gguf.")
    values = read_config(weights.checkpoint / ADAPTER_CONFIG)
    saved = values.get("modules_to_save")
    refused = [
        (
            str(values.get("peft_type")) != "LORA",
            f"it is a {values.get('peft_type')} adapter, and llama.cpp only supports LoRA",
        ),
        (bool(values.get("use_dora")), "llama.cpp does not support DoRA"),
        (bool(saved), f"llama.cpp drops {saved}, which were trained entirely"),
        (
            bool(values.get("lora_bias")) or values.get("bias") not in (None, "none"),
            "llama.cpp does not support trained biases",
        ),
        (bool(values.get("trainable_token_indices")), "llama.cpp drops the trained token rows"),
        (bool(values.get("target_parameters")), "llama.cpp does not support adapters on experts"),
        (
            values.get("init_lora_weights", True) not in HARMLESS_STARTS,
            "its initialisation changed the base's weights, and a GGUF file of the base does not have that",
        ),
    ]
    for is_so, why in refused:
        if is_so:
            raise UserError(f"--format gguf-adapter: {why}.", remedy=remedy)


def _gguf_dtype(stored: str | None) -> str:
    known = {name: short for short, name in TORCH_DTYPES.items()}
    return known.get(stored or "", "bf16")


def export_for_vllm(weights: Weights, output: Path, *, merge: bool, dtype: str | None = None) -> Exported:
    """Write a folder that vLLM serves, an adapter or a whole model, with the command to do so (`serve.sh`).

    Raises UserError for an adapter that vLLM would not apply as it was trained.
    """
    verify_if_sealed(weights.checkpoint)
    if weights.is_adapter and not merge:
        require_servable_adapter(weights)
    make_folder(output, must_be_empty=True)
    notes = write_weights(weights, output, merge=merge, dtype=dtype)
    command = vllm_command(weights, output, is_adapter=weights.is_adapter and not merge)
    write_text(output, {"serve.sh": f"#!/usr/bin/env bash\nexec {command}\n"})
    (output / "serve.sh").chmod(0o755)
    return Exported(folder=output, command=command, notes=notes)


def require_servable_adapter(weights: Weights) -> None:
    """Raise UserError for an adapter that vLLM does not apply as peft does."""
    values = read_config(weights.checkpoint / ADAPTER_CONFIG)
    rank = int(values.get("r") or 0)
    refused = [
        (
            str(values.get("peft_type")) != "LORA",
            f"it is a {values.get('peft_type')} adapter, and vLLM only supports LoRA",
        ),
        (bool(values.get("use_dora")), "vLLM does not support DoRA"),
        (
            bool(values.get("modules_to_save")),
            f"vLLM drops {values.get('modules_to_save')}, which were trained entirely",
        ),
        (bool(values.get("alpha_pattern")), "vLLM does not read its alpha_pattern"),
        (bool(values.get("rank_pattern")), "vLLM does not read its rank_pattern"),
        (bool(values.get("bias")) and values.get("bias") != "none", "vLLM does not support trained biases"),
        (bool(values.get("trainable_token_indices")), "vLLM drops the trained token rows"),
        (
            values.get("init_lora_weights") not in HARMLESS_STARTS,
            "its initialisation changed the base's weights",
        ),
        (rank > _VLLM_RANKS[-1], f"its rank {rank} is above vLLM's largest, {_VLLM_RANKS[-1]}"),
        (is_gguf(weights.base or ""), "its base is a GGUF file, on which vLLM does not apply adapters"),
    ]
    for is_so, why in refused:
        if is_so:
            raise UserError(f"--format vllm: {why}.", remedy="Add --merge to merge it into its base model.")


def vllm_command(weights: Weights, output: Path, *, is_adapter: bool) -> str:
    """Return the command that serves a folder."""
    name, folder = weights.name, str(output.resolve())
    trust = ["--trust-remote-code"] if weights.trust_remote_code else []
    if not is_adapter:
        return shlex.join(["vllm", "serve", folder, "--served-model-name", name, *trust])
    assert weights.base is not None
    rank = int(read_config(weights.checkpoint / ADAPTER_CONFIG)["r"])
    largest = next(value for value in _VLLM_RANKS if value >= rank)
    template = output / "chat_template.jinja"
    return shlex.join(
        [
            *("vllm", "serve", plain_folder(weights.base), "--enable-lora", "--max-lora-rank", str(largest)),
            *("--lora-modules", f"{name}={folder}", "--tokenizer", folder),
            *(["--chat-template", str(template.resolve())] if template.is_file() else []),
            *trust,
        ]
    )
