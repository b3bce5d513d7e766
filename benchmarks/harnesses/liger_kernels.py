"""Liger-Kernel's benchmark of single kernels (linkedin/Liger-Kernel, benchmark/scripts), on the meta device.

Each script makes its inputs and layers, runs forward, backward or both ten times, and takes the median of
torch.cuda.max_memory_allocated over each: what is kept from before counts, gradients too.  Scripts of single
losses and norms make the layer of torch and that of Liger, and run one of them.

What Liger's functions allocate follows their sources at the versions that the rows name (0.2.1, 0.4.2,
0.6.3); those of torch and transformers are what is installed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.hardware.device_kinds import CUBLAS_BYTES, CUBLAS_HOPPER_BYTES
from autosft.profiles.memory.program.blocks import Phase, Trace
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.liger import chunk_tokens
from autosft.profiles.memory.trace.recorder import Recorder
from autosft.profiles.memory.trace.tracing import Loop, Target, trace
from harnesses.prediction import NotPredictable, Row

NUM_RUNS = 3  # from the second on all are alike
A100_SMS = 108


@dataclass(slots=True)
class Kernel:
    """What a script runs: `forward` of kept inputs, and the gradient that its output is given."""

    layers: list[torch.nn.Module]
    kept: Any
    forward: Callable[[], torch.Tensor]
    output_gradient: Callable[[torch.Tensor], torch.Tensor | None]
    retains: bool = True


def peak_bytes(row: Row) -> int:
    """Predict the peak of one row; raises NotPredictable for kernels that are not reproduced."""
    config = json.loads(row["extra_benchmark_config_str"])
    config[row["x_name"]] = int(row["x_value"])
    build = _KERNELS.get(row["kernel_name"])
    if build is None:
        raise NotPredictable(_LEFT_OUT.get(row["kernel_name"], "the kernel is not reproduced"))
    kernel = build(config, row["kernel_provider"], row["liger_version"])
    mode = row["kernel_operation_mode"]

    def run(recorder: Recorder, autocast: Autocast, shape: Shape) -> None:  # noqa: ARG001
        with recorder.segment("inputs", Phase.INPUT):
            _note(recorder, kernel.kept)
            ready = kernel.forward() if mode == "backward" else None
            given = None if ready is None else torch.empty_like(ready)
        for _ in range(NUM_RUNS):
            with recorder.segment("run", Phase.FORWARD):
                if ready is not None:
                    ready.backward(given, retain_graph=True)
                elif mode == "forward":
                    kernel.forward()
                else:
                    output = kernel.forward()
                    output.backward(kernel.output_gradient(output), retain_graph=kernel.retains)
                    del output

    loop = Loop(model=torch.nn.ModuleList(kernel.layers), layers=[], run=run)
    target = Target(kind=DeviceKind.CUDA, capability=(8, 0))
    traced = trace(loop, Shape(batch=1, seq=1, scored=1), padded=False, target=target)
    # Full runs come first in a script, and the backward thread's workspace stays.
    multiplies = any("mm" in birth.operator for birth in traced.births)
    workspace = CUBLAS_HOPPER_BYTES if "H100" in row["gpu_name"] else CUBLAS_BYTES
    return peak_of_last_run(traced) + (2 * workspace if multiplies else 0)


def _note(recorder: Recorder, tensors: Any) -> None:
    for tensor in tensors:
        recorder.note(tensor, "input")


def peak_of_last_run(traced: Trace) -> int:
    live = peak = 0
    for segment in traced.segments:
        peak = live
        for event in segment.events:
            size = -(-traced.births[max(event, ~event)].size // 512) * 512
            live += size if event >= 0 else -size
            peak = max(peak, live)
    return peak


def _given(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    found = getattr(torch, config["dtype"].removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


# Losses


def cross_entropy(config: dict[str, Any], provider: str, _: str) -> Kernel:
    tokens = config["B"] * config["T"]
    logits, target = _given(tokens, config["V"], dtype=torch.float32), _given(tokens, dtype=torch.int64)
    loss = _CrossEntropy.apply if provider == "liger" else F.cross_entropy
    return Kernel([], (logits, target), lambda: loss(logits, target), lambda _: None, retains=False)


class _CrossEntropy(torch.autograd.Function):
    """0.2.1: the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = torch.zeros(len(logits), dtype=logits.dtype, device="meta")
        count = (target != -100).sum()
        ctx.save_for_backward(logits.detach())
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        return *ctx.saved_tensors, None


def fused_linear_cross_entropy(config: dict[str, Any], provider: str, _: str) -> Kernel:
    tokens, hidden, vocabulary, dtype = config["BT"], config["H"], config["V"], _dtype(config)
    heads = [torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype, device="meta") for _ in range(2)]
    states, target = _given(tokens, hidden, dtype=dtype), _given(tokens, dtype=torch.int64)

    def forward() -> torch.Tensor:
        if provider == "liger":
            loss: torch.Tensor = _FusedLinearCrossEntropy.apply(states, heads[0].weight, target)
            return loss
        return F.cross_entropy(heads[0](states), target)

    return Kernel(list(heads), (states, target), forward, lambda _: None, retains=False)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """0.4.2: fp32 logits of each chunk, and what the chunk before it left behind."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        step = chunk_tokens(len(states), states.shape[1], len(weight))
        grad_weight, grad_states = torch.zeros_like(weight), torch.zeros_like(states)
        losses = torch.zeros(len(states), dtype=torch.float32, device="meta")
        total = (target != -100).sum()
        for start in range(0, len(states), step):
            chunk = states[start : start + step]
            logits = chunk @ weight.t()
            logits = logits.float()
            logits = logits.to(states.dtype)
            share = 1 / total
            grad_logits = logits * share
            grad_states[start : start + step] = grad_logits @ weight
        loss = losses.sum()
        ctx.save_for_backward(grad_states.detach(), grad_weight.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        return *ctx.saved_tensors, None


# Feed-forward layers


def feed_forward(config: dict[str, Any], provider: str, _: str) -> Kernel:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    llama = LlamaConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        hidden_act=config["hidden_act"],
    )
    dtype = _dtype(config)
    with torch.device("meta"):
        layer = LlamaMLP(llama).to(dtype)
    batch = config.get("bsz", config.get("B"))
    states = _given(batch, config["T"], config["hidden_size"], dtype=dtype)

    def gated(x: torch.Tensor) -> torch.Tensor:
        if provider.startswith("liger"):
            gate, up = layer.gate_proj(x), layer.up_proj(x)  # which the tiled ones hold to the end
            out: torch.Tensor = layer.down_proj(_GatedProduct.apply(gate, up))
            return out
        plain: torch.Tensor = layer(x)
        return plain

    def forward() -> torch.Tensor:
        if provider.endswith("_tiled"):
            tiled: torch.Tensor = _Tiled.apply(gated, states, config["num_shards"])
            return tiled
        return gated(states)

    return Kernel([layer], (states,), forward, torch.empty_like)


class _GatedProduct(torch.autograd.Function):
    """SwiGLU and GEGLU: gate and up take their gradients' places."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        return gate.view(gate.shape), up.view(up.shape)


class _Tiled(torch.autograd.Function):
    """DeepSpeed's TiledMLP and Liger's after it: shards of the tokens, run again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, shards: int
    ) -> torch.Tensor:
        ctx.function, ctx.shards = function, shards
        ctx.save_for_backward(x)
        with torch.no_grad():
            parts = [function(part) for part in torch.chunk(x, shards, dim=-2)]
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        shape, width = x.shape, x.shape[-1]
        x = x.detach().requires_grad_().view(-1, width)
        incoming = gradients[0].view(-1, width)
        x_grad = torch.zeros_like(x)
        start = 0
        for shard in torch.chunk(x, ctx.shards, dim=0):
            part = shard.detach().requires_grad_()
            part.grad = x_grad.narrow(0, start, len(part))
            with torch.enable_grad():
                output = ctx.function(part)
            torch.autograd.backward(output, incoming.narrow(0, start, len(part)))
            start += len(part)
        return None, x_grad.view(shape), None


# Norms


def layer_norm(config: dict[str, Any], provider: str, version: str) -> Kernel:
    dtype = _dtype(config)
    layers = [torch.nn.LayerNorm(config["N"], device="meta") for _ in range(2)]
    states = _given(config["M"], config["N"], dtype=dtype)
    gradient = torch.empty_like(states, requires_grad=False)
    # 0.2.1 sums the weights' gradients by multiprocessor; 0.6 adds them up in place
    parts = A100_SMS if version == "0.2.1" else 1

    def forward() -> torch.Tensor:
        if provider == "liger":
            normed: torch.Tensor = _LayerNorm.apply(states, layers[0].weight, layers[0].bias, parts)
            return normed
        out: torch.Tensor = layers[0](states)
        return out

    return Kernel(list(layers), (states, gradient), forward, lambda _: gradient)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, parts: int
    ) -> torch.Tensor:
        mean, scale = x.new_empty(len(x)), x.new_empty(len(x))
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.parts = parts
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, *_ = ctx.saved_tensors
        gradient = torch.empty_like(x)
        sums = [item.new_empty((ctx.parts, len(item))) for item in (weight, bias)]
        return gradient, *(item.sum(dim=0) for item in sums), None


_KERNELS: dict[str, Callable[[dict[str, Any], str, str], Kernel]] = {
    "cross_entropy": cross_entropy,
    "fused_linear_cross_entropy": fused_linear_cross_entropy,
    "geglu": feed_forward,
    "swiglu": feed_forward,
    "tiled_swiglu": feed_forward,
    "layer_norm": layer_norm,
}
_LEFT_OUT = {
    "embedding": "12 to 14 GiB of it are not the script's: something else lived in that process",
    "rms_norm": "its code is not that of 0.2.1, which the rows name",
    "rope": "not reproduced: the trace has no rotation of Liger's",
}
