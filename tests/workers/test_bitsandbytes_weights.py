"""Weights in bitsandbytes' 4 and 8 bits: evaluated as they are trained over, and dequantized."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import Method, Precision
from autosft.workers.load_weights import load_base
from autosft.workers.training.load import load_model
from autosft.workers.training.train import train
from tests.optimizer_packages import run_again_with_them
from tests.workers.small import job, lora, make_data, make_model, pinned

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def small_llama(folder: Path, **sizes: int) -> Path:
    """Write a model whose rows of 64 numbers are as long as a block of bitsandbytes' kernels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_4_bit_layers_compute_evaluations_as_training(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also where a layer's outputs are no multiple of 32, as in Mamba 2."""
    if find_spec("bitsandbytes") is None:
        run_again_with_them(request)
        return
    folder = small_llama(tmp_path / "model", intermediate_size=192, num_key_value_heads=1)
    model = load_base(str(folder), dtype=torch.float32, method=Method.QLORA, precision=Precision.FP32)
    layer = model.model.layers[0].self_attn.k_proj
    assert (type(layer).__name__, layer.out_features) == ("Linear4bit", 16)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        trained = model.train()(input_ids=ids).logits
        evaluated = model.eval()(input_ids=ids).logits
        again = model.train()(input_ids=ids).logits
    assert torch.equal(trained, evaluated)
    assert torch.equal(trained, again)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.2), (8, 0.02)])
def test_bitsandbytes_weights_are_dequantized_or_trained_over(
    bits: int, tolerance: float, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if find_spec("bitsandbytes") is None:
        run_again_with_them(request)
        return
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = small_llama(tmp_path / "model", intermediate_size=128)
    plain = load_base(str(folder), dtype=torch.float32).state_dict()
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantized, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(folder)
    assert load_model_profile(str(folder)).quantization == f"bitsandbytes-{bits}bit"
    model = load_model(job(folder, data, tmp_path))
    for name, weight in model.state_dict().items():
        assert weight.dtype is torch.float32
        torch.testing.assert_close(
            weight, plain[name], rtol=0, atol=tolerance * float(plain[name].abs().max())
        )
    model.save_pretrained(tmp_path / "again")
    saved = load_base(str(tmp_path / "again"), dtype="auto").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    asked = replace(lora(), method=Method.QLORA)
    if bits == 4:
        over = load_model(job(folder, data, tmp_path, settings=asked))
        assert type(over.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        for precision in (Precision.FP32, Precision.BF16):  # trl's bf16 adapters are fp32 in the first
            held = pinned(data, precision=precision)
            over_it = job(folder, data, tmp_path / precision.value, settings=asked, pinned=held)
            end = train(over_it, lambda _: None, lambda: None)
            assert end.completed, end.message
