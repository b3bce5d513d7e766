"""Answer.AI's fsdp_qlora (AnswerDotAI/fsdp_qlora, train.py): LoRA and QLoRA under FSDP on two GPUs.

What it does, read in its train.py: a Llama in bf16, or with NF4 weights stored as bf16 and their scales whole
on every GPU, LoRA on all projections but the output's; FSDP (version 1) with a unit a decoder layer and one a
LoRA weight, so that frozen weights have no gradients; checkpointing a layer; HF's loss of early 2024, which
copies the shifted fp32 logits; torch's AdamW.  The model arrives layer by layer from the CPU: moved,
broadcast in buckets, flattened, cut; what that leaves in the cache counts in the peak reserved.  Gathered
parameters come from a stream of their own, whose blocks no other stream can use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.allocator.caching_allocator import CachingAllocator
from autosft.profiles.memory.program.blocks import Birth, Phase, Trace
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.sharding import BROADCAST_BUCKET_BYTES, coalesced
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.recorder import Recorder
from autosft.profiles.memory.trace.tracing import Loop, Target, trace
from harnesses.litgpt import build, decoder_of
from harnesses.litgpt_model import Block, Decoder, Gpt, Linear4bit, Method
from harnesses.prediction import NotPredictable, Prediction, Row
from harnesses.replayed import CUBLAS_WORKSPACE_BYTES

SOURCE = "Answer.AI fsdp_qlora"
TARGETS = ("query", "key", "value", "mlp")
DROPOUT = 0.1


def predict(row: Row) -> Prediction:
    """Predict the peaks of one row; raises NotPredictable for offloading and other kinds of sharding."""
    if "offload" in (row.get("sharding") or "").lower():
        raise NotPredictable("CPU offloading is not reproduced")
    if "FULL_SHARD" not in (row.get("sharding") or ""):
        raise NotPredictable(f"sharding {row.get('sharding')} is not reproduced")
    if row["method"] not in ("lora", "qlora") or not row.get("seq_len"):
        raise NotPredictable("neither LoRA nor QLoRA, or no length")
    quantized = row["method"] == "qlora"
    allocated, reserved, parameters = _peaks(
        row["model_id"], int(row.get("lora_r") or 64), quantized, int(row["per_device_batch"]),
        int(row["seq_len"]), int(row.get("n_gpus") or 2),
    )  # fmt: skip
    return Prediction(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        num_parameters=parameters,
        known_stack=False,
        note="versions not stated",
    )


def meta_model(row: Row) -> Gpt:
    """Return the row's model without an adapter."""
    return build(decoder_of(row["model_id"]), Method(name="full"), torch.bfloat16)


@functools.cache
def _peaks(
    model_id: str, rank: int, quantized: bool, batch: int, tokens: int, devices: int
) -> tuple[int, int, int]:
    method = Method(
        name="lora", rank=rank, dropout=DROPOUT, targets=TARGETS, quantization="nf4-dq" if quantized else None
    )
    model = build(decoder_of(model_id), method, torch.bfloat16)
    with torch.device("meta"):
        for block in model.blocks:
            block.attention = Attention(model.decoder, method)
    model.to(torch.bfloat16).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method.trains(name))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quantized_from = torch.bfloat16
    if quantized:  # the head stays in bf16
        with torch.device("meta"):
            model.head.linear = nn.Linear(  # type: ignore[assignment]
                model.decoder.hidden, model.decoder.vocabulary, bias=False, dtype=torch.bfloat16
            )
        model.head.requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sharded = Sharded(model, devices)
    loop = Loop(model=sharded, layers=[], run=functools.partial(_run, model=sharded))
    recorded = trace(
        loop,
        Shape(batch=batch, seq=tokens, scored=batch * tokens),
        padded=False,
        target=Target(kind=DeviceKind.CUDA, capability=(8, 6)),
    )
    allocated, reserved = _replay(recorded, sharded.gathered_sizes(), lambda pool: _wrap(pool, sharded))
    return allocated, reserved, parameters


class Attention(nn.Module):
    """transformers' Llama attention (sdpa without a mask), with projections of their own."""

    def __init__(self, decoder: Decoder, method: Method) -> None:
        super().__init__()
        self.decoder = decoder
        size = decoder.size_of_head
        of_heads, of_groups = decoder.heads * size, decoder.num_groups * size
        self.query = method.linear(decoder.hidden, of_heads, decoder.bias, "query")
        self.key = method.linear(decoder.hidden, of_groups, decoder.bias, "key")
        self.value = method.linear(decoder.hidden, of_groups, decoder.bias, "value")
        self.projection = method.linear(of_heads, decoder.hidden, decoder.bias, "projection")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, -1, self.decoder.size_of_head).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        if (repeats := self.decoder.heads // self.decoder.num_groups) > 1:
            key, value = (_repeated(tensor, repeats) for tensor in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out = out.transpose(1, 2).reshape(batch, tokens, -1)
        result: Tensor = self.projection(out)
        return result


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)


def _repeated(x: Tensor, repeats: int) -> Tensor:
    batch, groups, tokens, size = x.shape
    return x[:, :, None].expand(batch, groups, repeats, tokens, size).reshape(batch, -1, tokens, size)


class Layer(nn.Module):
    """One decoder layer as a unit of FSDP, with its LoRA weights as units of their own."""

    def __init__(self, block: Block, devices: int) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not in the module tree: what is on the device are the shards
        self.frozen = {name: one for name, one in block.named_parameters() if not one.requires_grad}
        self.trained = {name: one for name, one in block.named_parameters() if one.requires_grad}
        quantized = sum(module.weight.nbytes for module in block.modules() if isinstance(module, Linear4bit))
        self.frozen_bytes = sum(item.nbytes for item in self.frozen.values()) + quantized
        self.register_buffer("frozen_shard", _bf16(-(-self.frozen_bytes // devices)))
        shards = [_bf16(-(-item.nbytes // devices)) for item in self.trained.values()]
        self.trained_shards = nn.ParameterList(shards)
        for name, one in block.named_buffers():
            if "scales" in name:
                self.register_buffer(name.replace(".", "_"), one)
        self.gathered: list[Tensor] = []

    def gather(self) -> list[Tensor]:
        """Return the frozen flat parameter, and the trained ones, whole."""
        if not self.gathered:
            self.gathered = [
                _bf16(self.frozen_bytes),
                *(_bf16(item.nbytes) for item in self.trained.values()),
            ]
        return self.gathered

    def run(self, gathered: list[Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the block on views of gathered parameters (4-bit weights are read by kernels of their own)."""
        frozen, *trained = gathered
        views = {}
        start = 0
        for name, one in self.frozen.items():
            views[name] = frozen[start : start + one.numel()].view(one.shape)
            start += one.numel()
        for (name, one), flat in zip(self.trained.items(), trained, strict=True):
            views[name] = flat.view(one.shape)
        result: Tensor = functional_call(self.__dict__["block"], views, (x, cos, sin))
        return result


class Sharded(nn.Module):
    """What one GPU holds of the model."""

    def __init__(self, model: Gpt, devices: int) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.root = [*model.embedding.parameters(), *model.last_norm.parameters(), *model.head.parameters()]
        self.root_bytes = sum(item.nbytes for item in self.root)
        self.layers = nn.ModuleList(Layer(block, devices) for block in model.blocks)  # type: ignore[arg-type]
        self.register_buffer("root_shard", _bf16(-(-self.root_bytes // devices)))

    def gathered_sizes(self) -> frozenset[int]:
        """Return the sizes of blocks that come from the stream that gathers."""
        sizes = {self.root_bytes}
        for layer in self.layers:
            assert isinstance(layer, Layer)
            sizes |= {layer.frozen_bytes, *(item.nbytes for item in layer.trained.values())}
        return frozenset(sizes)


def _bf16(num_bytes: int) -> Tensor:
    return torch.empty(-(-num_bytes // 2), dtype=torch.bfloat16, device="meta")


class _Checkpointed(torch.autograd.Function):
    """A unit's forward pass, run again in its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, previous: Layer | None, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        ctx.layer, ctx.previous, ctx.angles = layer, previous, (cos, sin)
        ctx.save_for_backward(x)
        gathered = layer.gather()
        with torch.no_grad():
            result = layer.run(gathered, x, cos, sin)
        layer.gathered = []
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layer: Layer = ctx.layer
        (x,) = ctx.saved_tensors
        frozen, *trained = layer.gather()
        with torch.enable_grad(), _prefetching(layer, ctx.previous):
            x = x.detach().requires_grad_()
            trained = [item.detach().requires_grad_() for item in trained]
            result = layer.run([frozen, *trained], x, *ctx.angles)
        of_x, *of_trained = torch.autograd.grad(result, [x, *trained], gradients[0])
        del result
        for shard in layer.trained_shards:
            of_trained.pop(0)
            shard.grad = torch.empty_like(shard)  # reduced and scattered
        layer.gathered = []
        return None, None, of_x, None, None


@contextlib.contextmanager
def _prefetching(layer: Layer, previous: Layer | None) -> Iterator[None]:
    """Gather the previous layer where FSDP does.

    BackwardPrefetch.BACKWARD_PRE gathers the unit that ended its forward pass before the one whose backward
    pass begins.  Before the layer that is the last of its LoRA weights; the previous layer comes before the
    first of them, those of the queries, which are the last to run backward.
    """

    def ended(_: nn.Module, __: Any, normed: Tensor) -> None:
        if previous is not None:
            normed.register_hook(lambda _: [None, previous.gather()][0])

    handle = layer.__dict__["block"].norm_1.register_forward_hook(ended)
    try:
        yield
    finally:
        handle.remove()


def _root_views(flat: Tensor, model: Gpt) -> tuple[Tensor, Tensor, Tensor]:
    embedding = model.embedding.weight.shape
    count = embedding.numel()
    norm = flat[2 * count :]
    return flat[:count].view(embedding), flat[count : 2 * count].view(embedding), norm


def _run(recorder: Recorder, autocast: Autocast, shape: Shape, *, model: Sharded) -> None:  # noqa: ARG001
    """Two steps of train.py."""
    whole: Gpt = model.__dict__["model"]
    whole.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    angles = whole.rotation(shape.seq)
    for _ in range(2):
        with recorder.segment("step", Phase.INPUT):
            ids, labels = (
                torch.zeros(shape.batch, shape.seq, dtype=torch.long, device="meta") for _ in range(2)
            )
            recorder.enter(Phase.FORWARD)
            root = _bf16(model.root_bytes)
            embedding, head, norm = _root_views(root, whole)
            x = F.embedding(ids, embedding).requires_grad_()
            previous: Layer | None = None
            for layer in model.layers:
                assert isinstance(layer, Layer)
                x = _Checkpointed.apply(layer, previous, x, *angles)
                previous = layer
            recorder.enter(Phase.HEAD)
            x = functional_call(whole.last_norm, {"weight": norm}, (x,))
            logits = F.linear(x, head).float()
            shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
            loss = F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))
            del shifted, x
            recorder.enter(Phase.LOSS_BACKWARD)
            assert isinstance(previous, Layer)
            previous.gather()  # the root's backward pass prefetches the last layer
            loss.backward()
            del root, embedding, head, norm
            recorder.enter(Phase.OPTIMIZER)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
            del logits, loss


# Replay: the wrapping of the model, then the trace, with two streams


def _wrap(pool: CachingAllocator, model: Sharded) -> None:
    """What arriving leaves in the cache: every unit is moved, broadcast, flattened and cut."""
    units: list[tuple[list[int], int]] = []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        block: Block = layer.__dict__["block"]
        for one, shard in zip(layer.trained.values(), layer.trained_shards, strict=True):
            units.append(([one.nbytes], shard.nbytes))
        frozen = [module.weight.nbytes for module in block.modules() if isinstance(module, Linear4bit)]
        norms_last = sorted(layer.frozen, key=lambda name: "norm" in name)
        frozen += [layer.frozen[name].nbytes for name in norms_last]
        shard = layer.frozen_shard
        assert isinstance(shard, Tensor)
        units.append((frozen, shard.nbytes))
    shard = model.root_shard
    assert isinstance(shard, Tensor)
    units.append(([item.nbytes for item in model.root], shard.nbytes))
    sent: list[Any] = []  # dropped, but the stream that sends has not passed them
    for sizes, shard_bytes in units:
        moved = [pool.malloc(sizes[0])]
        for one in sent:  # the copy from the host has waited for it
            pool.free(one)
        moved += [pool.malloc(size) for size in sizes[1:]]
        buckets = coalesced(sizes, (BROADCAST_BUCKET_BYTES,))
        sent = [
            pool.malloc(sum(bucket)) for bucket in buckets if len(bucket) > 1
        ]  # one alone is sent as it is
        flat = pool.malloc(sum(sizes))
        pool.malloc(shard_bytes)  # stays: the shard, as which the trace does not count it again
        pool.free(flat)
        for one in moved:  # FSDP's list of them outlives the handle's construction
            pool.free(one)
    for one in sent:
        pool.free(one)


def _replay(
    recorded: Trace, gathered: frozenset[int], wrap: Callable[[CachingAllocator], None]
) -> tuple[int, int]:
    """Return peak allocated and peak reserved over the streams that compute, gather and reduce.

    A gathered unit is dropped before its stream has passed it.  `limit_all_gathers` waits for the older of
    two dropped units before it gathers another (torch/distributed/fsdp/_limiter_utils.py): where the next
    layer is gathered at once, the dropped one still occupies its block; when LoRA weights follow, no more.
    """
    compute, gathering, reducing = CachingAllocator(), CachingAllocator(), CachingAllocator()
    wrap(compute)
    shards = {
        event
        for segment in recorded.segments
        if segment.name == "setup"
        for event in segment.events
        if "scale" not in recorded.births[event].operator
    }
    arrived = compute.allocated_bytes
    blocks: dict[int, tuple[CachingAllocator, Any]] = {}
    waiting: list[tuple[CachingAllocator, Any]] = []  # dropped, but their stream has not passed them yet
    peak_reserved = 0
    compute.malloc(CUBLAS_WORKSPACE_BYTES)
    skipped = 0
    for segment in recorded.segments:
        for event in segment.events:
            if event in shards and skipped < arrived:
                skipped += recorded.births[event].size
                continue
            if event >= 0:
                birth = recorded.births[event]
                pool = gathering if _is_gathered(birth, gathered) else compute
                if birth.operator.startswith("aten::empty_like") and birth.phase is Phase.LOSS_BACKWARD:
                    pool = reducing  # a share of reduced gradients, which stays until the optimizer's step
                blocks[event] = (pool, pool.malloc(birth.size))
                for first, old in waiting:
                    first.free(old)
                waiting.clear()
            elif ~event in blocks:
                pool, block = blocks.pop(~event)
                if pool is gathering and segment.name != "setup":
                    waiting.append((pool, block))
                else:
                    pool.free(block)
            reserved = sum(pool.reserved_bytes for pool in (compute, gathering, reducing))
            peak_reserved = max(peak_reserved, reserved)
    return recorded.peak_bytes() + CUBLAS_WORKSPACE_BYTES, peak_reserved


def _is_gathered(birth: Birth, gathered: frozenset[int]) -> bool:
    return birth.size in gathered and birth.operator.startswith("aten::empty")
