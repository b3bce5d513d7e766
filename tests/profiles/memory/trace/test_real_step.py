"""The traced step against the same step on real tensors, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from autosft.profiles.memory.program.program import Shape
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision
from tests.profiles.memory.models import config_json, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from benchmarks.real_step import real_peak_bytes, traced_peak_bytes  # noqa: E402 - needs torch

pytestmark = pytest.mark.slow

CONFIG = config_json(
    vocab_size=2000, hidden_size=128, intermediate_size=352, head_dim=32, num_hidden_layers=3
)
SHAPE = Shape(batch=2, seq=120, scored=2 * 119)
LORA = {"method": Method.LORA, "adapter": AdapterSettings(rank=4, alpha=8, targets="all-linear")}
NORMS = {
    "method": Method.LORA,
    "adapter": AdapterSettings(rank=4, alpha=8, targets="all-linear", kind="ln_tuning"),
}
FP32 = {"precision": Precision.FP32}

CASES: dict[str, dict[str, Any]] = {
    "AdamW for-loop": {**FP32, "optimizer": "adamw_torch"},
    "AdamW fused": {**FP32, "optimizer": "adamw_torch_fused"},
    "SGD": {**FP32, "optimizer": "sgd"},
    "RMSprop": {**FP32, "optimizer": "rmsprop"},
    "Adagrad, whose state is there at once": {**FP32, "optimizer": "adagrad"},
    "Adafactor": {**FP32, "optimizer": "adafactor"},
    "bf16 weights": {"precision": Precision.BF16, "optimizer": "adamw_torch"},
    "bf16 autocast": {"precision": Precision.BF16_AUTOCAST, "optimizer": "adamw_torch"},
    "bf16 autocast, checkpointed": {
        "precision": Precision.BF16_AUTOCAST,
        "checkpointing": Checkpointing.NON_REENTRANT,
    },
    "reentrant checkpointing": {**FP32, "checkpointing": Checkpointing.REENTRANT},
    "accumulated": {**FP32, "gradient_accumulation": 2},
    "not clipped": {**FP32, "max_grad_norm": 0.0},
    "eager attention": {**FP32, "attention": "eager"},
    "LoRA": {**FP32, **LORA},
    "LoRA over bf16 weights": {**LORA, "precision": Precision.BF16},
    "LoRA over fp16 weights, loss scaled": {**LORA, "precision": Precision.FP16},
    "LoRA over fp16 weights, checkpointed": {
        **LORA,
        "precision": Precision.FP16,
        "checkpointing": Checkpointing.NON_REENTRANT,
    },
    "norms over fp16 weights": {**NORMS, "precision": Precision.FP16},
}
ROW = Shape(batch=5, seq=240, scored=239, is_row=True)
ROW_CASES: dict[str, dict[str, Any]] = {
    "AdamW for-loop": {**FP32, "optimizer": "adamw_torch"},
    "bf16 autocast, checkpointed": {
        "precision": Precision.BF16_AUTOCAST,
        "checkpointing": Checkpointing.NON_REENTRANT,
    },
    "accumulated": {**FP32, "gradient_accumulation": 2},
    "LoRA over bf16 weights": {**LORA, "precision": Precision.BF16},
}


@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_holds_what_the_real_one_does(name: str) -> None:
    recipe = step_recipe(**CASES[name])
    traced, real = traced_peak_bytes(CONFIG, recipe, SHAPE), real_peak_bytes(CONFIG, recipe, SHAPE)
    assert traced[1] == real[1]
    # optimizers count their steps in a tensor of four bytes, on the CPU wherever the parameter is
    assert traced[0] == pytest.approx(real[0], abs=4096)


@pytest.mark.parametrize("name", ROW_CASES)
def test_a_traced_row_holds_what_five_examples_in_one_do(name: str) -> None:
    recipe = step_recipe(**ROW_CASES[name], padding_free=True)
    traced, real = traced_peak_bytes(CONFIG, recipe, ROW), real_peak_bytes(CONFIG, recipe, ROW)
    assert traced[0] == pytest.approx(real[0], abs=4096)
