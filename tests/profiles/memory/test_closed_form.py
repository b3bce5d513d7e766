from __future__ import annotations

import json

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.closed_form import closed_form, decoder_shape
from autosft.profiles.recipe import (
    AdapterSettings,
    Checkpointing,
    LengthProfile,
    Method,
    Precision,
    StepRecipe,
)

LLAMA_2_7B = json.dumps(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
)


def recipe(method: Method) -> StepRecipe:
    lora = (
        AdapterSettings(rank=8, alpha=16, targets=("q_proj", "v_proj")) if method is not Method.FULL else None
    )
    return StepRecipe(
        method=method,
        adapter=lora,
        precision=Precision.BF16,
        optimizer="adamw_torch_fused",
        checkpointing=Checkpointing.NON_REENTRANT,
        attention="sdpa",
    )


LENGTHS = LengthProfile(lengths=(100, 512), scored=(50, 300), max_length=512)


def test_parameter_count_of_llama_2_7b() -> None:
    assert decoder_shape(LLAMA_2_7B).parameters == 6_738_415_616


def test_components_add_up_and_adapters_need_less() -> None:
    answers = {
        method: closed_form(LLAMA_2_7B, recipe(method), 1, LENGTHS, DeviceKind.CUDA)
        for method in (Method.FULL, Method.LORA, Method.QLORA)
    }
    for answer in answers.values():
        assert sum(size for _, size in answer.components) == answer.allocated.median_bytes
        assert answer.allocated.upper_bytes > answer.allocated.median_bytes
    need = {method: answer.need.median_bytes for method, answer in answers.items()}
    assert need[Method.FULL] > need[Method.LORA] > need[Method.QLORA]
    # weights, gradients and two moments in 16 bits
    assert need[Method.FULL] > 8 * 6_738_415_616
