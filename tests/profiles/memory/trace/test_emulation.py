from __future__ import annotations

import collections

import pytest

from autosft.profiles.hardware.device import DeviceKind

torch = pytest.importorskip("torch")


def operators(device: str, *, emulated: bool) -> collections.Counter[tuple[str, str, tuple[int, ...]]]:
    """Count (operator, dtype, shape) of a forward and backward pass under bf16 autocast for the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from autosft.profiles.memory.trace.emulation import Autocast, emulate

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: collections.Counter[tuple[str, str, tuple[int, ...]]] = collections.Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                return True
            result = func(*args, **(kwargs or {}))
            first = result if isinstance(result, torch.Tensor) else None
            if first is not None and func.name() not in (
                "aten::detach",
                "aten::view",
                "aten::t",
                "aten::_unsafe_view",
            ):
                self.seen[(func.name(), str(first.dtype), tuple(first.shape))] += 1
            return result

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    mask = torch.zeros(2, 1, 8, 8, device=device)
    mode = Operators()
    if emulated:
        autocast = Autocast(torch.bfloat16, DeviceKind.CPU)
        with emulate(DeviceKind.CPU, (8, 0), autocast), mode:
            with autocast():
                loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
            loss.backward()
    else:
        with mode:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
            loss.backward()
    return mode.seen


def test_emulated_autocast_runs_the_operators_of_the_real_one() -> None:
    real, emulated = operators("cpu", emulated=False), operators("meta", emulated=True)
    different = (real - emulated) + (emulated - real)
    # the rotary embedding switches autocast off, which meta leaves out: two casts of a few numbers
    assert sum(different.values()) <= 8, different
    assert sum(real.values()) > 200
