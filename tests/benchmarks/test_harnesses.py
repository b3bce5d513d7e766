"""The reproduced training loops, on models small enough to reckon by hand."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from harnesses import litgpt
from harnesses.fsdp1 import FlatParameter
from harnesses.litgpt_model import Decoder, Gpt, Method

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.program.blocks import Trace
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace.tracing import Loop, Target, trace

TINY = Decoder(layers=2, hidden=64, heads=4, groups=2, vocabulary=512, intermediate=128)
LORA = Method(name="lora", rank=4, targets=("query", "value"))


def traced(decoder: Decoder, method: Method, batch: int, lengths: tuple[int, ...]) -> Trace:
    model = litgpt.build(decoder, method, torch.bfloat16)
    run = functools.partial(litgpt._run, held=model, model=model, method=method, lengths=lengths)
    loop = Loop(model=model, layers=list(model.blocks), run=run)
    shape = Shape(batch=batch, seq=max(lengths), scored=batch * max(lengths))
    return trace(loop, shape, padded=False, target=Target(kind=DeviceKind.CUDA, capability=(8, 0)))


def sizes(recorded: Trace, operator: str) -> list[int]:
    return [birth.size for birth in recorded.births if operator in birth.operator]


def test_output_is_cast_to_fp32_in_chunks() -> None:
    recorded = traced(TINY, LORA, batch=1, lengths=(256,))
    whole, last = 128 * 512 * 4, 127 * 512 * 4
    assert sizes(recorded, "_log_softmax")[:2] == [whole, last]


def test_only_lora_is_trained() -> None:
    model = litgpt.build(TINY, LORA, torch.bfloat16)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    queries, values = 64, 32
    assert trained == TINY.layers * (2 * 4 * 64 + 4 * (queries + values))


@pytest.mark.parametrize("name", ["full", "lora", "adapter", "adapter_v2"])
@pytest.mark.parametrize("parallel", [False, True])
def test_every_method_and_kind_of_block_runs(name: str, parallel: bool) -> None:
    decoder = dataclasses.replace(TINY, layers=3, parallel=parallel, norm="layer", feed_forward="plain")
    one = traced(decoder, Method(name=name, targets=("query",)), batch=1, lengths=(96,)).peak_bytes()
    two = traced(decoder, Method(name=name, targets=("query",)), batch=2, lengths=(96,)).peak_bytes()
    assert one < two


def test_inputs_of_4bit_layers_live_as_long_as_the_graph() -> None:
    """bitsandbytes keeps them as attributes: the next forward pass still has those of the last one."""
    quantized = Method(name="lora", rank=4, targets=("query", "value"), quantization="nf4")
    model = dataclasses.replace(TINY, layers=8, intermediate=1024, vocabulary=128)
    growth = {}
    for method in (LORA, quantized):
        once = traced(model, method, batch=4, lengths=(128,)).peak_bytes()
        twice = traced(model, method, batch=4, lengths=(128, 128, 128)).peak_bytes()
        growth[method.quantization] = twice - once
    inputs_of_down = model.layers * 4 * 128 * 1024 * 2
    assert growth["nf4"] - growth[None] > inputs_of_down / 2


def test_4bit_weights_take_half_a_byte_and_their_scales() -> None:
    plain = litgpt.build(TINY, Method(name="lora"), torch.bfloat16)
    quantized = litgpt.build(TINY, Method(name="lora", quantization="nf4"), torch.bfloat16)

    def held(model: Gpt) -> int:
        return sum(parameter.nbytes for parameter in (*model.parameters(), *model.buffers()))

    linear = sum(module.weight.numel() for module in plain.modules() if isinstance(module, torch.nn.Linear))
    assert held(plain) - held(quantized) == linear * 2 - linear // 2 - linear // 64 * 4


def test_two_gpus_hold_half_the_weights_and_gather_the_rest() -> None:
    one, _ = litgpt._peak(TINY, LORA, 1, (64, 16), torch.bfloat16, 1)
    two, _ = litgpt._peak(TINY, LORA, 1, (64, 16), torch.bfloat16, 2)
    assert one != two
    weight = torch.nn.Parameter(torch.empty(7, 3, device="meta"))
    flat = FlatParameter({"weight": weight}, devices=2, dtype=torch.bfloat16)
    assert flat.shard.numel() == 11
    assert flat.views(flat.gather())["weight"].shape == (7, 3)


def test_reduced_gradients_are_cut() -> None:
    weight = torch.nn.Parameter(torch.empty(8, device="meta"))
    flat = FlatParameter({"weight": weight}, devices=2, dtype=torch.float32)
    flat.accumulate(torch.empty(8, device="meta"), reduce=False)
    assert flat.gradient is not None
    assert flat.shard.grad is None
    flat.accumulate(torch.empty(8, device="meta"), reduce=True)
    assert flat.gradient is None
    assert flat.shard.grad is not None
    assert flat.shard.grad.numel() == 4
