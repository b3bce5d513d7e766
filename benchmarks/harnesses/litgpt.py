"""LitGPT's fine-tuning scripts (Lightning-AI/litgpt, finetune/{lora,full,adapter,adapter_v2}.py).

What they do, read in the scripts and in Lightning Fabric: the model in bf16 on the GPU; Fabric casts its
output, the list of logits over 128 tokens each, to fp32 (16-bit and fp32 logits live side by side for a
moment); cross entropy chunk by chunk, so that the fp32 log-probabilities of all chunks are kept; `logits`
and `loss`, and with them the graph, stay until the next forward pass has ended; gradients are accumulated;
torch's AdamW, or bitsandbytes' paged one with 4-bit weights, whose states are outside of the allocator.  The
peak *allocated* is recorded, in units of 1e9 bytes.

Two GPUs: FSDP (version 1) with one unit a block, activation checkpointing a block, gradients not reduced
while they are accumulated.  See `litgpt_fsdp`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.program.blocks import Phase
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.optimizers import KeptState
from autosft.profiles.memory.trace.recorder import Recorder
from autosft.profiles.memory.trace.tracing import Loop, Target, trace
from autosft.profiles.optimizers import find_optimizer
from harnesses.fsdp1 import FsdpModel
from harnesses.litgpt_model import DECODERS, Decoder, Gpt, Method
from harnesses.prediction import NotPredictable, Prediction, Row
from harnesses.replayed import replay_trace

SOURCES = ("LitGPT resource tables", "LitGPT config_hub table", "LitGPT finetune_lora tutorial")
CHUNK_TOKENS = 128

#: Names in rows that differ from `DECODERS`.
_ALIASES = {
    "llama-2-7b-hf": "llama-2-7b",
    "llama-2-13b-hf": "llama-2-13b",
    "llama-2-70b-hf": "llama-2-70b",
    "mistral 7b v0.2 base (as named)": "mistral-7b",
    "meta-llama-3-8b": "llama-3-8b",
    "meta-llama-3.1-8b": "llama-3-8b",
    "llama-3.1-8b": "llama-3-8b",
    "mistral-7b-v0.1": "mistral-7b",
    "mistral-7b-v0.2": "mistral-7b",
    "tinyllama-1.1b-intermediate-step-1431k-3t": "tinyllama-1.1b",
    "tiny-llama": "tinyllama-1.1b",
    "gemma2-2b": "gemma-2-2b",
    "gemma2-9b": "gemma-2-9b",
    "phi-3": "phi-3-mini-4k-instruct",
}
_METHODS = {"lora": "lora", "qlora": "lora", "full": "full", "adapter": "adapter", "adapter_v2": "adapter_v2"}
_QUANTIZATIONS = {"bnb.nf4": "nf4", "bnb.nf4-dq": "nf4-dq", "bnb.fp4": "nf4", "bnb.fp4-dq": "nf4-dq"}


def predict(row: Row) -> Prediction:
    """Predict the allocated peak of one row; raises NotPredictable where the row is incomplete."""
    decoder = decoder_of(row["model_id"])
    method = _method(row)
    batch, tokens = row.get("per_device_batch"), row.get("seq_len")
    if not batch or not tokens:
        raise NotPredictable("batch or length is not stated")
    # The resource tables' runs begin with the longest example and go on with ordinary ones; in the others
    # every batch may reach the cap.
    steady = row["source"] != "LitGPT resource tables"
    if not steady and decoder.norm == "rms":
        # Weighted in fp32: so in copies of lit-gpt of 2023, not in the stored original that was read.
        decoder = dataclasses.replace(decoder, norm="wide rms")
    lengths = (int(tokens),) * 4 if steady else (int(tokens), int(tokens) // 4)
    dtype = torch.float32 if "mixed" in (row.get("mixed_precision") or "") else torch.bfloat16
    devices = int(row.get("n_gpus") or 1)
    allocated, parameters = _peak(decoder, method, int(batch), lengths, dtype, devices)
    return Prediction(
        allocated_bytes=allocated,
        reserved_bytes=None,
        num_parameters=parameters,
        known_stack=True,
        note=f"{devices} GPUs" if devices > 1 else "",
    )


def meta_model(row: Row) -> Gpt:
    """Return the row's model without an adapter."""
    return build(decoder_of(row["model_id"]), Method(name="full"), torch.bfloat16)


def decoder_of(model_id: str) -> Decoder:
    """Return the sizes of a model by its name in a row; raises NotPredictable."""
    name = model_id.rsplit("/", maxsplit=1)[-1].lower()
    decoder = DECODERS.get(_ALIASES.get(name, name))
    if decoder is None:
        raise NotPredictable(f"no LitGPT configuration of {model_id} is at hand")
    return decoder


def _method(row: Row) -> Method:
    name = _METHODS.get(row["method"])
    if name is None:
        raise NotPredictable(f"LitGPT's method {row['method']} is not reproduced")
    quantization = row.get("quantization")
    if quantization is not None and quantization not in _QUANTIZATIONS:
        raise NotPredictable(f"quantization {quantization} is not reproduced")
    targets = row.get("lora_targets") or (["query", "value"] if name == "lora" else [])
    if isinstance(targets, str):
        raise NotPredictable(f"the adapter's targets are not listed: {targets}")
    return Method(
        name=name,
        rank=int(row.get("lora_r") or 8),
        targets=tuple(targets),
        quantization=_QUANTIZATIONS[quantization] if quantization else None,
    )


@functools.cache
def _peak(
    decoder: Decoder, method: Method, batch: int, lengths: tuple[int, ...], dtype: torch.dtype, devices: int
) -> tuple[int, int]:
    """Return the peak of live tensors in bytes and the number of parameters."""
    model = build(decoder, method, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = list(model.blocks)
    held: Gpt | FsdpModel = model
    if devices > 1:
        held, layers = FsdpModel(model, model.blocks, devices=devices, dtype=dtype), []
    run = functools.partial(_run, held=held, model=model, method=method, lengths=lengths)
    loop = Loop(model=held, layers=layers, run=run)
    target = Target(
        kind=DeviceKind.CUDA,
        capability=(8, 0),
        autocast_dtype=torch.bfloat16 if dtype is torch.float32 else None,
    )
    shape = Shape(batch=batch, seq=max(lengths), scored=batch * max(lengths))
    return replay_trace(trace(loop, shape, padded=False, target=target)).peak_allocated_bytes, parameters


def build(decoder: Decoder, method: Method, dtype: torch.dtype) -> Gpt:
    """Build the model on the meta device with weights of `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Gpt(decoder, method)
    finally:
        torch.set_default_dtype(default)


def _run(
    recorder: Recorder,
    autocast: Autocast,
    shape: Shape,
    *,
    held: Gpt | FsdpModel,
    model: Gpt,
    method: Method,
    lengths: tuple[int, ...],
) -> None:
    """Forward and backward passes over batches of the given lengths; every second one ends a step."""
    model.train()
    trained = [parameter for parameter in held.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer | None
    if method.quantization:
        optimizer = KeptState(trained, find_optimizer("paged_adamw_32bit"), on_cpu=False)
    elif isinstance(held, FsdpModel) and method.name != "full":
        optimizer = None  # works on the trained parts of flat parameters: a few MB
    else:
        optimizer = torch.optim.AdamW(trained)
    chunk = 0 if method.name == "full" else CHUNK_TOKENS
    angles = model.rotation(max(lengths))
    logits: list[Tensor] = []
    loss: Any = None
    for number, tokens in enumerate(lengths, start=1):
        steps = number % 2 == 0 and len(lengths) > 2  # the resource tables accumulate over 32 to 128
        with recorder.segment("micro", Phase.INPUT):
            if isinstance(held, FsdpModel):
                held.reduce = steps
            ids, targets = (
                torch.zeros(shape.batch, tokens, dtype=torch.long, device="meta") for _ in range(2)
            )
            recorder.enter(Phase.FORWARD)
            with autocast():
                logits = _cast_output(held, ids, angles, chunk)
            recorder.enter(Phase.HEAD)
            logits[-1] = logits[-1][..., :-1, :]
            loss = _cross_entropy(logits, targets[..., 1:])
            recorder.enter(Phase.LOSS_BACKWARD)
            loss.backward()
            if isinstance(held, FsdpModel):
                held.end_backward()
            if steps and optimizer is not None:
                recorder.enter(Phase.OPTIMIZER)
                optimizer.step()
                optimizer.zero_grad()
    del logits, loss


def _cast_output(
    model: Gpt | FsdpModel, ids: Tensor, angles: tuple[Tensor, Tensor], chunk: int
) -> list[Tensor]:
    """What Fabric's wrapped forward returns: all logits again, in fp32."""
    logits = model(ids, angles, chunk=chunk)
    return [part.to(torch.float32) for part in logits]


def _cross_entropy(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Cross entropy over chunks of 128 tokens, as many as there are."""
    if len(logits) == 1:  # the head was not chunked
        flat = logits[0].reshape(-1, logits[0].shape[-1])
        parts, labels = flat.split(CHUNK_TOKENS), targets.reshape(-1).split(CHUNK_TOKENS)
    else:
        parts = tuple(part.reshape(-1, part.shape[-1]) for part in logits)
        labels = tuple(part.reshape(-1) for part in targets.split(logits[0].shape[1], dim=1))
    losses = [
        F.cross_entropy(part, label, reduction="none") for part, label in zip(parts, labels, strict=True)
    ]
    return torch.cat(losses).sum() / (targets != -100).sum()
