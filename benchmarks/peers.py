"""What other estimators say for a published row: the figures that a user would get from them.

- accelerate: its own function behind `accelerate estimate-memory`, the "training with Adam" column for the
  row's dtype (called, not copied; its hub look-up is left out).
- DeepSpeed: `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs` without
  offload, as formulas (deepspeed/runtime/zero/stage_1_and_2.py and stage3.py; DeepSpeed itself is not a
  dependency): 4 B a parameter + 16 B a parameter over all GPUs; 4 B a parameter of the largest layer + 18 B a
  parameter over all GPUs.
- LLaMA-Factory: the "Hardware Requirement" table of its README, column "xB", GB per billion parameters.

All of them speak of weights and optimizer, none of batch and length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]

#: README.md of hiyouga/LLaMA-Factory, "Hardware Requirement": (method, bits) -> GB per billion parameters.
LLAMA_FACTORY_GB_PER_BILLION = {
    ("full", 32): 18.0,
    ("full", 16): 8.0,  # pure_bf16
    ("adapter", 16): 2.0,  # Freeze/LoRA/GaLore/APOLLO/BAdam/OFT
    ("adapter", 8): 1.0,  # QLoRA
    ("adapter", 4): 0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What peers look at; parameters are counted with tied weights once, sizes in fp32."""

    num_parameters: int
    largest_layer_parameters: int
    fp32_bytes: int


def size_of(model: torch.nn.Module) -> ModelSize:
    """Measure a model on the meta device."""
    from accelerate.utils import calculate_maximum_sizes

    total_bytes, _ = calculate_maximum_sizes(model.to(torch.float32))
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_layer_parameters=max(
            sum(parameter.numel() for parameter in module.parameters(recurse=False))
            for module in model.modules()
        ),
        fp32_bytes=int(total_bytes),
    )


def _accelerate(row: Row, size: ModelSize) -> float:
    from accelerate.commands.estimate import estimate_training_usage

    if "32" in str(row.get("weights_dtype")):
        total, dtype = size.fp32_bytes, "float32"
    else:
        # `accelerate estimate-memory --dtypes bfloat16` halves the size before it asks
        total, dtype = size.fp32_bytes // 2, "bfloat16"
    return float(max(estimate_training_usage(total, dtype).values()))


def _zero2(row: Row, size: ModelSize) -> float:
    return 4 * size.num_parameters + 16 * size.num_parameters / _gpus(row)


def _zero3(row: Row, size: ModelSize) -> float:
    return 4 * size.largest_layer_parameters + 18 * size.num_parameters / _gpus(row)


def _llama_factory(row: Row, size: ModelSize) -> float:
    if row["method"] == "full":
        key = ("full", 32 if "32" in str(row.get("weights_dtype")) else 16)
    else:
        quantization = str(row.get("quantization") or "")
        bits = 8 if "8" in quantization else 4 if "4" in quantization else 16
        key = ("adapter", bits)
    return LLAMA_FACTORY_GB_PER_BILLION[key] * size.num_parameters


def _gpus(row: Row) -> int:
    return int(row.get("n_gpus") or 1)


PEERS: dict[str, Callable[[Row, ModelSize], float]] = {
    "accelerate": _accelerate,
    "deepspeed_zero2": _zero2,
    "deepspeed_zero3": _zero3,
    "llama_factory": _llama_factory,
}
