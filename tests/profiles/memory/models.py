"""Small configurations and recipes that the tests of the memory model share."""

from __future__ import annotations

import json
from typing import Any

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.recipe import Checkpointing, LengthProfile, Method, Precision, StepRecipe


def config_json(model_type: str = "llama", **changes: Any) -> str:
    values = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **changes,
    }
    return json.dumps({"model_type": model_type, **values})


def step_recipe(**changes: Any) -> StepRecipe:
    values: dict[str, Any] = {
        "method": Method.FULL,
        "adapter": None,
        "precision": Precision.BF16,
        "optimizer": "adamw_torch_fused",
        "checkpointing": Checkpointing.OFF,
        "attention": "sdpa",
        **changes,
    }
    return StepRecipe(**values)


def device_profile(kind: DeviceKind = DeviceKind.CUDA, gib: int = 40) -> DeviceProfile:
    on_gpu = kind is DeviceKind.CUDA
    return DeviceProfile(
        uuid="GPU-0" if on_gpu else "CPU-host",
        kind=kind,
        name="NVIDIA A100-SXM4-40GB" if on_gpu else "CPU",
        node="host",
        index=0,
        total_bytes=gib << 30,
        free_bytes=gib << 30,
        compute_capability=(8, 0) if on_gpu else None,
        supports_bf16=True,
        num_cores=108,
        matmul_flops_per_s=None,
        memory_bytes_per_s=None,
        rates_measured=False,
        context_bytes=400 << 20 if on_gpu else 0,
        is_mig=False,
        is_assumed=True,
        power_limit_w=None,
        temperature_c=None,
        throttle_reasons=(),
        processes=(),
    )


def length_profile(longest: int = 400, count: int = 40) -> LengthProfile:
    lengths = tuple(longest - (37 * i) % (longest // 2) for i in range(count))
    return LengthProfile(lengths=lengths, scored=tuple(n // 2 for n in lengths), max_length=longest)
