"""Tiny checkpoints that are stored in unusual ways, each with the plain weights that are in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.workers.small import VOCAB_SIZE, make_model

Weights = dict[str, torch.Tensor]


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def store(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    save_file(
        {name: one.contiguous() for name, one in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def fp8(folder: Path) -> Weights:
    """As Qwen3-*-FP8: e4m3 codes with one scale a matrix."""
    plain = weights_of(make_model(folder))
    stored: Weights = {}
    for name, weight in list(plain.items()):
        if "proj" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.full((1, 1), scale.item())
            plain[name] = stored[name].float() * scale
        else:
            stored[name] = weight
    store(folder, stored)
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    change_config(folder, quantization_config={**quantized, "weight_block_size": [128, 128]})
    return plain


def fp8_ragged(folder: Path) -> Weights:
    """As DeepSeek-V3's 576 rows in blocks of 128: the last block of a side may be smaller."""
    plain = weights_of(make_model(folder))
    sizes = (12, 12)  # of weights of 8, 16 and 32 a side: 16 is two of these, and so is not two of 8
    stored: Weights = {}
    for name, weight in list(plain.items()):
        if "proj" not in name:
            stored[name] = weight
            continue
        scales = torch.empty([-(-side // size) for side, size in zip(weight.shape, sizes, strict=True)])
        codes, numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                place = tuple(
                    slice(at * size, (at + 1) * size) for at, size in zip((row, column), sizes, strict=True)
                )
                scale = weight[place].abs().max() / 448 * (1 + row + 2 * column)
                codes[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
                numbers[place] = codes[place].float() * scale
                scales[row, column] = scale
        stored[name], stored[f"{name}_scale_inv"], plain[name] = codes, scales, numbers
    store(folder, stored)
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(sizes)}
    change_config(folder, quantization_config=quantized)
    return plain


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(folder: Path) -> Weights:
    """As gpt-oss: the experts' codes of four bits, with an exponent for every 32 of them."""
    from transformers import GptOssConfig, GptOssForCausalLM

    make_model(folder)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=64,
        initial_context_length=64,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=1,
    )
    GptOssForCausalLM(config).save_pretrained(folder)
    plain = weights_of(folder)
    stored: Weights = {}
    table = torch.tensor([*FP4, *(-item for item in FP4)])
    for name, weight in list(plain.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inside, outside = weight.shape  # stored with the last two the other way round
            codes = torch.randint(16, (experts, outside, inside // 32, 32))
            exponents = torch.randint(120, 126, (experts, outside, inside // 32))
            pairs = codes.view(experts, outside, inside // 32, 16, 2)
            stored[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
            stored[f"{name}_scales"] = exponents.to(torch.uint8)
            values = table[codes] * torch.exp2(exponents.float() - 127).unsqueeze(-1)
            plain[name] = values.view(experts, outside, inside).transpose(1, 2)
        else:
            stored[name] = weight
    store(folder, stored)
    change_config(
        folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    return plain


#: Kinds that transformers dequantizes with what is installed here.
DEQUANTIZED: Mapping[str, Callable[[Path], Weights]] = {
    "fp8": fp8,
    "fp8, sides that are no multiples of blocks": fp8_ragged,
    "mxfp4": mxfp4,
}

#: `quantization_config` of kinds that cannot be dequantized, or not here, with a word of the refusal.
REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, "auto-round"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "MLX": ({"bits": 4, "group_size": 64}, "MLX"),
    "ExLlama": ({"quant_method": "exl2", "bits": 4.0}, "exl2"),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
    "one that nobody knows": ({"quant_method": "q17"}, "q17"),
}

#: Kinds that are dequantized by a package that is optional.
NEEDS_PACKAGE: Mapping[str, tuple[dict[str, Any], str]] = {
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "bitsandbytes 4-bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bitsandbytes 8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
}

# Names and shapes that are not the model's

Change = Callable[[Weights], Weights]


def _prefixed(prefix: str) -> Change:
    return lambda weights: {prefix + name: one for name, one in weights.items()}


def _without(part: str) -> Change:
    return lambda weights: {name: one for name, one in weights.items() if part not in name}


def _with(name: str, *shape: int) -> Change:
    return lambda weights: {**weights, name: torch.zeros(shape)}


#: What was done to a checkpoint of `small.make_model`, and a word of the refusal.
WRONG: Mapping[str, tuple[Change, str]] = {
    "torch.compile's prefix": (_prefixed("_orig_mod."), "torch.compile"),
    "DDP's prefix": (_prefixed("module."), "DistributedDataParallel"),
    "peft's prefix": (_prefixed("base_model.model."), "merge_and_unload"),
    "FSDP's prefix inside": (
        lambda weights: {
            name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): one for name, one in weights.items()
        },
        "FSDP",
    ),
    "a layer is missing": (_without("layers.1."), "missing in it (model.layers.1."),
    "the head is missing": (_without("lm_head"), "lm_head.weight"),
    "one norm is missing": (_without("model.norm"), "model.norm.weight"),
    "a bias that the model has no place for": (
        _with("model.layers.0.self_attn.q_proj.bias", 16),
        "no place in the model (model.layers.0.self_attn.q_proj.bias)",
    ),
    "a layer more than config.json says": (
        _with("model.layers.2.self_attn.q_proj.weight", 16, 16),
        "model.layers.2.self_attn.q_proj.weight",
    ),
    "another vocabulary": (
        lambda weights: {
            name: torch.cat([one, one[:3]]) if "embed" in name else one for name, one in weights.items()
        },
        "model.embed_tokens.weight is [35, 16], the model's [32, 16]",
    ),
    "codes without a quantization": (
        lambda weights: {
            name: (one * 127).to(torch.int8) if "down_proj" in name else one for name, one in weights.items()
        },
        "holds 2 weights as int8 (model.layers.0.mlp.down_proj.weight",
    ),
    "scales without a quantization": (
        _with("model.layers.0.self_attn.q_proj.weight_scale_inv", 1, 1),
        "no quantization_config",
    ),
}


def _with_value(value: float) -> Change:
    def change(weights: Weights) -> Weights:
        one = weights["model.layers.1.self_attn.q_proj.weight"].clone()
        one[0, 0] = value
        return {**weights, "model.layers.1.self_attn.q_proj.weight": one}

    return change


def _zeros(part: str) -> Change:
    return lambda weights: {
        name: torch.zeros_like(one) if part in name else one for name, one in weights.items()
    }


#: Whose values, not names, are wrong: seen at every load, as no plan reads them.
BROKEN: Mapping[str, tuple[Change, str]] = {
    "NaN": (
        _with_value(float("nan")),
        "no numbers (NaN or infinite): model.layers.1.self_attn.q_proj.weight",
    ),
    "infinite": (_with_value(float("inf")), "no numbers"),
    "a download that broke off": (_zeros("layers"), "nothing but zeros"),
    "all zeros": (_zeros(""), "nothing but zeros"),
}

#: What may differ and is no fault.
RIGHT: Mapping[str, Change] = {
    "as it is": lambda weights: weights,
    "old rotary buffers": _with("model.layers.0.self_attn.rotary_emb.inv_freq", 4),
    "old masks": _with("model.layers.0.self_attn.masked_bias", 1),
    "without the base model's prefix": lambda weights: {
        name.removeprefix("model."): one for name, one in weights.items()
    },
}
