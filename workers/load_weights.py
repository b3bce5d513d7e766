"""Load causal language models: the only place where weights are read from disk, for every command.

Names and shapes of all loaded weights are checked against the model's, or the adapter's
(`profiles.model.weight_keys`).  Quantized checkpoints are dequantized (`profiles.model.quantization`).
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from autosft.profiles.errors import MissingExtraError, UserError
from autosft.profiles.model import quantization
from autosft.profiles.model.adapted_layers import read_directly
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG, WEIGHT_FILES, base_of, is_adapter_folder
from autosft.profiles.model.adapters import hold_in_fp32
from autosft.profiles.model.files import weight_files
from autosft.profiles.model.gguf import is_gguf, plain_folder
from autosft.profiles.model.model_class import auto_class, build, ready_for_text
from autosft.profiles.model.own_head import untie
from autosft.profiles.model.weight_keys import (
    is_composite,
    quiet_loading,
    require_numbers,
    require_whole,
    require_whole_adapter,
    stored_tensors,
)
from autosft.profiles.model.weight_values import require_numbers_in, require_values
from autosft.profiles.recipe import Method, Precision

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_base(
    source: str,
    *,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
    method: Method = Method.FULL,
    precision: Precision | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Load a model folder or hub id, dequantized, or 4-bit for QLoRA; of an adapter's folder the base model.

    `dtype` is that of the weights in memory, "auto" for the stored one.  `arguments` are further arguments of
    `from_pretrained`.  Raises UserError for weights that do not match the model and for a quantized
    checkpoint that cannot be dequantized, MissingExtraError where QLoRA needs bitsandbytes.
    """
    base = base_of(source) if is_adapter_folder(source) else None
    place = plain_folder(base or source)
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    stored = quantization.quantization_of(config)
    scheme = quantization.require_trainable(source, stored, is_read_here=True)
    quantization.require_method(source, scheme, method)
    how = quantization.dequantizing_config(scheme)
    if stored is None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # an empty one
        arguments["config"] = config
    if method is Method.QLORA and scheme is None:
        how = _nf4(precision, _kept_whole(config, trust_remote_code=trust_remote_code))
    if scheme is not None and scheme.startswith("bitsandbytes") and method is not Method.QLORA:
        arguments.setdefault(
            "device_map", {"": "cpu"}
        )  # else quantized weights would be moved to a GPU first
    given = {} if how is None else {"quantization_config": how}
    with quiet_loading(), quantization.whole_blocks(stored):
        model, report = auto_class(config).from_pretrained(
            place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # mismatches are in the report
            output_loading_info=True,
            **given,
            **arguments,
        )
    require_whole(report, source, model.config, composite=is_composite(config))
    if scheme is None and Path(place).is_dir():
        for path in weight_files(Path(place)):
            require_numbers(model, source, stored_tensors(path))
    require_values(model, source)
    inside, head = model.get_input_embeddings(), model.get_output_embeddings()
    if inside is not None and head is not None and head.weight is not inside.weight:
        untie(model.config)  # or a program that goes by a saved configuration would lose the head
    if scheme is not None and method is not Method.QLORA:
        _forget_quantization(model, dtype if isinstance(dtype, torch.dtype) else None)
    if method is Method.QLORA:
        _evaluate_as_trained(model)
    return ready_for_text(model)


def load_adapter(base: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Return a base model with the adapter in a folder or of a hub id.

    Raises UserError for missing and for unexpected weights.
    """
    from peft import PeftModel

    for name in WEIGHT_FILES:
        if (path := Path(folder) / name).is_file():
            stored_tensors(path)  # says what is wrong with a file that is none
    of_base = {id(parameter) for parameter in base.parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
            hold_in_fp32(
                model, [parameter for parameter in model.parameters() if id(parameter) not in of_base]
            )
            # Load again: into fp32 copies of layers, and to learn what is missing.
            result = model.load_adapter(str(folder), "default", is_trainable=is_trainable)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the adapter in {folder} does not fit its base model: {_first_line(error)}",
                remedy="Use the base model that it was trained on.",
            ) from error
    # peft's warning omits weights that several layers share, which is not an error
    is_missing = any("missing adapter keys" in str(item.message) for item in caught)
    # ... and prompts, which peft loads itself.
    is_prompt = model.active_peft_config.is_prompt_learning
    require_whole_adapter(
        result.missing_keys if is_missing else (), () if is_prompt else result.unexpected_keys, str(folder)
    )
    added = ((name, one) for name, one in model.named_parameters() if id(one) not in of_base)
    require_numbers_in(added, f"the adapter in {folder}")
    return model


def load_adapter_weights(model: PeftModel, folder: str) -> None:
    """Initialise an adapter that is to be trained with the weights of one in a folder.

    Raises UserError for missing and for unexpected weights.
    """
    result = model.load_adapter(folder, "default", is_trainable=True)
    require_whole_adapter(result.missing_keys, result.unexpected_keys, folder)


def load_any(
    source: str, *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, **arguments: Any
) -> PreTrainedModel | PeftModel:
    """Load a model folder, an adapter's folder with the base model that it names, or a hub id."""
    base = base_of(source)
    if base is None:
        return load_base(source, dtype=dtype, trust_remote_code=trust_remote_code, **arguments)
    model = load_base(base, dtype=dtype, trust_remote_code=trust_remote_code, **arguments)
    return load_adapter(model, source)


def name_base(checkpoint: Path, base: str) -> None:
    """Make an adapter's checkpoint name the GGUF file as its base, not the folder with its conversion.

    That folder is in the cache, and may be deleted before the adapter is loaded again.
    """
    path = checkpoint / ADAPTER_CONFIG
    if is_adapter_folder(base):
        base = base_of(base) or base
    if is_gguf(base) and path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = str(Path(base).expanduser().resolve())
        path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _kept_whole(config: Any, *, trust_remote_code: bool) -> list[str] | None:
    """Return the layers that cannot be 4-bit; None where that is only the output head, the default."""
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        model = build(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    kept = [*read_directly(model)]
    return [*kept, *get_keys_to_not_convert(model)] if kept else None


def _nf4(precision: Precision | None, kept_whole: list[str] | None) -> Any:
    """Return bitsandbytes' configuration for QLoRA: NF4 with double quantization."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(what="--method qlora", extra="gpu") from error
    from transformers import BitsAndBytesConfig

    scales_loss = precision is not None and precision.scales_loss
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if scales_loss else torch.bfloat16,
        llm_int8_skip_modules=kept_whole,
    )


def _evaluate_as_trained(model: PreTrainedModel) -> None:
    """Make 4-bit layers compute evaluations as they compute training.

    On CPUs with bf16 instructions, bitsandbytes 0.50.2 packs the weights of a layer when it first evaluates:
    their scales are rounded to bf16, and it fails where a layer's outputs are no multiple of 32 (Mamba 2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _forget_quantization(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Turn a model from a quantized checkpoint into a plain one, which is saved as such.

    bitsandbytes' layers are dequantized here, others were while loading.  transformers would otherwise save
    quantized weights.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model.dequantize(dtype)
        if dtype is not None:  # unquantized weights still have the checkpoint's dtype
            model.to(dtype)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(model, name):
            setattr(model, name, False)
    model._weight_conversions = None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
