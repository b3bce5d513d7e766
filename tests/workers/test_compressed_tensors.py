"""Checkpoints of compressed-tensors (llm-compressor, vLLM): dequantized on loading, value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autosft.profiles.model.profile import load_model_profile
from autosft.workers.load_weights import load_base
from tests.workers import checkpoints
from tests.workers.small import make_model

pytest.importorskip("compressed_tensors", reason="reading them takes the package, of the extra dev")

GROUP = 8
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]


def channels(weight: torch.Tensor, name: str, largest: float, dtype: torch.dtype) -> Stored:
    """Codes with a scale for each row, and the numbers that they stand for."""
    scale = weight.abs().amax(1, keepdim=True) / largest
    codes = weight / scale if dtype.is_floating_point else (weight / scale).round()
    codes = codes.to(dtype)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.float() * scale


def packed(weight: torch.Tensor, name: str) -> Stored:
    """Codes of four bits, eight in an integer, with a scale for each group in a row."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(2) / 7
    codes = (groups / scale[..., None]).round().clamp(-8, 7)
    stored = {
        f"{name}.weight_packed": pack_to_int32(codes.reshape(weight.shape).to(torch.int8), 4),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    return stored, (codes * scale[..., None]).reshape(weight.shape)


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "int-quantized": (
        lambda weight, name: channels(weight, name, 127, torch.int8),
        {"num_bits": 8, "type": "int", "strategy": "channel"},
    ),
    "float-quantized": (
        lambda weight, name: channels(weight, name, 448, torch.float8_e4m3fn),
        {"num_bits": 8, "type": "float", "strategy": "channel"},
    ),
    "pack-quantized": (packed, {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_numbers_that_the_codes_stand_for_are_loaded_and_saved_plain(kind: str, tmp_path: Path) -> None:
    quantized, how = FORMATS[kind]
    folder = make_model(tmp_path / "model")
    plain, stored = checkpoints.weights_of(folder), {}
    for name, weight in list(plain.items()):
        if "proj" in name:
            codes, plain[name] = quantized(weight, name.removesuffix(".weight"))
            stored |= codes
        else:
            stored[name] = weight
    checkpoints.store(folder, stored)
    weights = {"symmetric": True, "dynamic": False, "observer": "minmax", **how}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    checkpoints.change_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    )

    assert load_model_profile(str(folder)).quantization == "compressed-tensors"
    model = load_base(str(folder), dtype=torch.float32)
    assert model.state_dict().keys() == plain.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = load_base(str(tmp_path / "again"), dtype="auto")
    assert not hasattr(again.config, "quantization_config")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
