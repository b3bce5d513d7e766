"""A decoder with the memory behaviour of LitGPT's, for the meta device.

Written from the description of its modules, not copied: one projection for queries, keys and values, rotation
in fp32 (the table is rebuilt in fp32 when training starts), LoRA as a parallel branch with dropout, zeros
where a third of the joint projection has none, and bitsandbytes' 4-bit linear, which keeps its input as an
attribute of the graph node instead of as a saved tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER_PROMPT_TOKENS = 10
ADAPTER_FIRST_LAYER = 2
LORA_SCALE = 2.0
QUANTIZATION_BLOCK = 64  # values that share a scale; 256 scales share one more with double quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of a model as in litgpt/config.py; `rotated` is the part of a head that is rotated."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int  # padded
    intermediate: int
    groups: int = 0  # of keys and values; 0: as many as heads
    head_size: int = 0  # 0: hidden / heads
    rotated: float = 1.0
    norm: str = "rms"  # "layer", or "wide rms": weighted in fp32, as until the end of 2023
    parallel: bool = False  # attention and feed-forward beside each other
    shared_norm: bool = False
    feed_forward: str = "silu"  # gated by silu or gelu; "plain": one linear and gelu
    bias: bool = False
    head_bias: bool = False
    scaled_embedding: bool = False
    post_norms: bool = False
    attention_cap: float = 0.0  # tanh on attention scores
    sliding: bool = False  # every other layer builds a mask

    @property
    def num_groups(self) -> int:
        return self.groups or self.heads

    @property
    def size_of_head(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def qkv_size(self) -> int:
        return (self.heads + 2 * self.num_groups) * self.size_of_head


_PHI: dict[str, Any] = {
    "norm": "layer",
    "parallel": True,
    "shared_norm": True,
    "feed_forward": "plain",
    "bias": True,
}
_GEMMA: dict[str, Any] = {
    "vocabulary": 256000,
    "head_size": 256,
    "feed_forward": "gelu",
    "scaled_embedding": True,
}
_GEMMA_2 = _GEMMA | {"post_norms": True, "attention_cap": 50.0, "sliding": True}

#: Lower-case model name, as rows have it after the last "/".  Source: LitGPT's config.py, for Yi the
#: config.json of 01-ai/Yi-34B.
DECODERS: dict[str, Decoder] = {
    "phi-1_5": Decoder(layers=24, hidden=2048, heads=32, vocabulary=51200, intermediate=8192, rotated=0.5,
                       head_bias=True, **_PHI),
    "phi-2": Decoder(layers=32, hidden=2560, heads=32, vocabulary=51200, intermediate=10240, rotated=0.4,
                     head_bias=True, **_PHI),
    "phi-3-mini-4k-instruct": Decoder(layers=32, hidden=3072, heads=32, vocabulary=32064, intermediate=8192),
    "stablelm-base-alpha-3b": Decoder(layers=16, hidden=4096, heads=32, vocabulary=50688, intermediate=16384,
                                      rotated=0.25, **(_PHI | {"shared_norm": False})),
    "falcon-7b": Decoder(layers=32, hidden=4544, heads=71, groups=1, vocabulary=65024, intermediate=18176,
                         norm="layer", parallel=True, shared_norm=True, feed_forward="plain"),
    "falcon-40b": Decoder(layers=60, hidden=8192, heads=128, groups=8, vocabulary=65024, intermediate=32768,
                          norm="layer", parallel=True, feed_forward="plain"),
    "llama-2-7b": Decoder(layers=32, hidden=4096, heads=32, vocabulary=32000, intermediate=11008),
    "llama-2-13b": Decoder(layers=40, hidden=5120, heads=40, vocabulary=32000, intermediate=13824),
    "llama-2-70b": Decoder(layers=80, hidden=8192, heads=64, groups=8, vocabulary=32000, intermediate=28672),
    "yi-34b": Decoder(layers=60, hidden=7168, heads=56, groups=8, vocabulary=64000, intermediate=20480),
    "llama-3-8b": Decoder(layers=32, hidden=4096, heads=32, groups=8, vocabulary=128256, intermediate=14336),
    "llama-3.2-1b": Decoder(layers=16, hidden=2048, heads=32, groups=8, vocabulary=128256, intermediate=8192),
    "llama-3.2-3b": Decoder(layers=28, hidden=3072, heads=24, groups=8, vocabulary=128256, intermediate=8192),
    "mistral-7b": Decoder(layers=32, hidden=4096, heads=32, groups=8, vocabulary=32000, intermediate=14336),
    "tinyllama-1.1b": Decoder(layers=22, hidden=2048, heads=32, groups=4, vocabulary=32000,
                              intermediate=5632),
    "gemma-2b": Decoder(layers=18, hidden=2048, heads=8, groups=1, intermediate=16384, **_GEMMA),
    "gemma-7b": Decoder(layers=28, hidden=3072, heads=16, intermediate=24576, **_GEMMA),
    "gemma-2-2b": Decoder(layers=26, hidden=2304, heads=8, groups=4, intermediate=9216, **_GEMMA_2),
    "gemma-2-9b": Decoder(layers=42, hidden=3584, heads=16, groups=8, intermediate=14336, **_GEMMA_2),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is trained, and how frozen weights are kept.

    `name` is full, lora, adapter or adapter_v2; `targets` are LitGPT's words (query, key, value, projection,
    mlp, head); `quantization` is None, "nf4" or "nf4-dq".
    """

    name: str
    rank: int = 8
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    quantization: str | None = None

    def trains(self, parameter: str) -> bool:
        """Whether a parameter of that name is trained."""
        words = {
            "full": ("",),
            "lora": ("lora_",),
            "adapter": ("adapter_prompt", "gate"),
            "adapter_v2": ("adapter_", "gate", "norm"),
        }[self.name]
        return any(word in parameter for word in words)

    def linear(self, inputs: int, outputs: int, bias: bool, kind: str) -> nn.Module:
        """Return the linear layer that LitGPT puts at a place of that kind."""
        if self.name == "lora":
            return LoraLinear(self, inputs, outputs, bias, self.rank if kind in self.targets else 0)
        if self.name == "adapter_v2":
            return ScaledLinear(self, inputs, outputs, bias)
        return self.frozen_linear(inputs, outputs, bias)

    def frozen_linear(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """Return a linear layer without an adapter, quantized where the method says so."""
        if self.quantization is None:
            return nn.Linear(inputs, outputs, bias=bias)
        return Linear4bit(inputs, outputs, bias, double=self.quantization.endswith("dq"))


class _MatMul4Bit(torch.autograd.Function):
    """bitsandbytes' product with 4-bit weights (0.41 to 0.43).

    The weights are expanded to the dtype from which they were quantized, and cast to the input's; the
    input is kept as an attribute, so it lives as long as the graph, not only until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, shape: _ShapeAndType, bias: Any
    ) -> Tensor:
        ctx.kept, ctx.shape = (x, weight), shape
        if scales.dtype is torch.uint8:
            scales = torch.empty(scales.numel(), dtype=torch.float32, device=x.device)
            scales = scales + 1.0
        return F.linear(x, _expanded(shape, x), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ _expanded(ctx.shape, gradient), None, None, None, None


_ShapeAndType = tuple[tuple[int, int], torch.dtype]


def _expanded(shape: _ShapeAndType, like: Tensor) -> Tensor:
    size, dtype = shape
    return torch.empty(size, dtype=dtype, device=like.device).to(like.dtype)


class Linear4bit(nn.Module):
    """A linear layer with NF4 weights."""

    def __init__(self, inputs: int, outputs: int, bias: bool, *, double: bool) -> None:
        super().__init__()
        count = inputs * outputs
        blocks = -(-count // QUANTIZATION_BLOCK)
        self.shape = (outputs, inputs)
        self.register_buffer("weight", torch.empty(-(-count // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8 if double else torch.float32))
        if double:
            self.register_buffer("outer_scales", torch.empty(-(-blocks // 256), dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.quantized_from = torch.float16  # in which Lightning quantizes

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.shape, self.quantized_from)
        result: Tensor = _MatMul4Bit.apply(x, self.weight, self.scales, shape, self.bias)
        return result


class LoraLinear(nn.Module):
    """A frozen linear layer and, if `rank` is positive, a trained branch beside it."""

    def __init__(self, method: Method, inputs: int, outputs: int, bias: bool, rank: int) -> None:
        super().__init__()
        self.linear = method.frozen_linear(inputs, outputs, bias)
        self.rank = rank
        self.dropout = nn.Dropout(method.dropout)
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, inputs))
            self.lora_b = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        if not self.rank:
            return out
        return out + self.dropout(x) @ self.lora_a.transpose(0, 1) @ self.lora_b.transpose(0, 1) * LORA_SCALE


class LoraQkv(nn.Module):
    """The joint projection with a branch for some of queries, keys and values."""

    def __init__(self, decoder: Decoder, method: Method) -> None:
        super().__init__()
        self.outputs = decoder.qkv_size
        self.linear = method.frozen_linear(decoder.hidden, self.outputs, decoder.bias)
        self.dropout = nn.Dropout(method.dropout)
        self.grouped = decoder.num_groups != decoder.heads
        size = decoder.size_of_head
        widths = {"query": decoder.heads, "key": decoder.num_groups, "value": decoder.num_groups}
        self.widths = [count * size for name, count in widths.items() if name in method.targets]
        self.everywhere = len(self.widths) == len(widths)
        if self.widths:
            self.lora_a = nn.Parameter(torch.empty(method.rank * len(self.widths), decoder.hidden))
            self.lora_b = nn.Parameter(torch.empty(sum(self.widths), method.rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        if not self.widths:
            return out
        low = F.linear(self.dropout(x), self.lora_a).transpose(-2, -1)
        kernel = self.lora_b.unsqueeze(-1)
        if self.grouped:
            parts = zip(low.chunk(len(self.widths), dim=1), kernel.split(self.widths), strict=True)
            branch = torch.cat([F.conv1d(part, weight) for part, weight in parts], dim=1)
        else:
            branch = F.conv1d(low, kernel, groups=len(self.widths))
        return out + self._spread(branch.transpose(-2, -1)) * LORA_SCALE

    def _spread(self, branch: Tensor) -> Tensor:
        """Put zeros where there is no branch."""
        if self.everywhere:
            return branch
        branch = branch.transpose(0, 1)
        whole = branch.new_zeros((*branch.shape[:-1], self.outputs)).view(-1, self.outputs)
        columns = torch.empty(sum(self.widths), dtype=torch.long, device=branch.device)
        whole = whole.index_copy(1, columns, branch.reshape(-1, sum(self.widths)))
        return whole.view((*branch.shape[:-1], self.outputs)).transpose(0, 1)


class ScaledLinear(nn.Module):
    """A frozen linear layer whose output is shifted and scaled (LLaMA-Adapter v2)."""

    def __init__(self, method: Method, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear = method.frozen_linear(inputs, outputs, bias)
        self.adapter_bias = nn.Parameter(torch.empty(outputs))
        self.adapter_scale = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter_scale * (self.linear(x) + self.adapter_bias)


class RmsNorm(nn.Module):
    """Root mean square norm in fp32, cast back before the weight or, `wide`, after it."""

    def __init__(self, size: int, *, wide: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean = torch.mean(wide * wide, dim=-1, keepdim=True)
        normed = wide * torch.rsqrt(mean + 1e-5)
        if self.wide:
            return (self.weight * normed).to(x.dtype)
        return normed.to(x.dtype) * self.weight


def _norm(decoder: Decoder) -> nn.Module:
    if decoder.norm == "layer":
        return nn.LayerNorm(decoder.hidden)
    return RmsNorm(decoder.hidden, wide=decoder.norm == "wide rms")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (turned * sin)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, decoder: Decoder, method: Method, layer: int) -> None:
        super().__init__()
        self.decoder, self.layer = decoder, layer
        width = decoder.heads * decoder.size_of_head
        self.qkv = (
            LoraQkv(decoder, method)
            if method.name == "lora"
            else method.linear(decoder.hidden, decoder.qkv_size, decoder.bias, "qkv")
        )
        self.projection = method.linear(width, decoder.hidden, decoder.bias, "projection")
        self.adapted = method.name.startswith("adapter") and layer >= ADAPTER_FIRST_LAYER
        if self.adapted:
            self.adapter_prompt = nn.Embedding(ADAPTER_PROMPT_TOKENS, decoder.hidden)
            self.gate = nn.Parameter(torch.empty(1, 1, decoder.heads, 1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        decoder = self.decoder
        batch, tokens, _ = x.shape
        query, key, value = self._split(self.qkv(x))
        per_group = decoder.heads // decoder.num_groups
        if per_group > 1:
            shape = (batch, decoder.num_groups, per_group, tokens, decoder.size_of_head)
            key, value = key.expand(shape), value.expand(shape)
        query, key, value = (
            tensor.reshape(batch, -1, tokens, decoder.size_of_head) for tensor in (query, key, value)
        )
        rotated = int(decoder.rotated * decoder.size_of_head)
        query = torch.cat((_rotate(query[..., :rotated], cos, sin), query[..., rotated:]), dim=-1)
        key = torch.cat((_rotate(key[..., :rotated], cos, sin), key[..., rotated:]), dim=-1)
        mask = None
        if decoder.sliding and self.layer % 2 == 0:
            mask = query.new_empty(tokens, tokens)
            mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool), -1e9)
        out = self._attend(query, key, value, mask)
        if self.adapted:
            out = out + self.gate * self._attend_to_prompt(query, batch, tokens)
        return self.projection(out.reshape(batch, tokens, -1))  # type: ignore[no-any-return]

    def _split(self, qkv: Tensor) -> Sequence[Tensor]:
        groups = self.decoder.num_groups
        per_group = self.decoder.heads // groups
        qkv = qkv.view(qkv.shape[0], qkv.shape[1], groups, per_group + 2, self.decoder.size_of_head)
        return qkv.permute(0, 2, 3, 1, 4).split((per_group, 1, 1), dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        cap = self.decoder.attention_cap
        if not cap:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
            return out.transpose(1, 2)
        scores = query @ key.mT * self.decoder.size_of_head**-0.5
        scores = torch.tanh(scores / cap) * cap
        if mask is None:
            mask = query.new_ones(query.shape[2], query.shape[2]).triu(diagonal=1)
            mask.masked_fill_(mask.bool(), -1e9)
        weights = F.softmax(scores + mask, dim=-1, dtype=torch.float).to(query.dtype)
        return (weights @ value).transpose(1, 2)

    def _attend_to_prompt(self, query: Tensor, batch: int, tokens: int) -> Tensor:
        decoder = self.decoder
        _, key, value = self._split(self.qkv(self.adapter_prompt.weight[None]))
        per_group = decoder.heads // decoder.num_groups
        if decoder.num_groups != 1:
            key, value = (tensor.repeat_interleave(per_group, dim=2) for tensor in (key, value))
        shape = (1, -1, ADAPTER_PROMPT_TOKENS, decoder.size_of_head)
        key, value = (tensor.reshape(shape).expand(batch, -1, -1, -1) for tensor in (key, value))
        mask = torch.ones(tokens, ADAPTER_PROMPT_TOKENS, dtype=torch.bool, device=query.device)
        return self._attend(query, key, value, mask)


class FeedForward(nn.Module):
    def __init__(self, decoder: Decoder, method: Method) -> None:
        super().__init__()
        self.kind = decoder.feed_forward
        self.up = method.linear(decoder.hidden, decoder.intermediate, decoder.bias, "mlp")
        if self.kind != "plain":
            self.gated = method.linear(decoder.hidden, decoder.intermediate, decoder.bias, "mlp")
        self.down = method.linear(decoder.intermediate, decoder.hidden, decoder.bias, "mlp")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]
        first, second = self.up(x), self.gated(x)
        opened = F.silu(first) if self.kind == "silu" else F.gelu(first, approximate="tanh")
        return self.down(opened * second)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, decoder: Decoder, method: Method, layer: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.norm_1 = _norm(decoder)
        self.attention = Attention(decoder, method, layer)
        self.norm_2 = nn.Identity() if decoder.shared_norm else _norm(decoder)
        self.feed_forward = FeedForward(decoder, method)
        self.post_norm_1 = _norm(decoder) if decoder.post_norms else nn.Identity()
        self.post_norm_2 = _norm(decoder) if decoder.post_norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm_1(x)
        attended = self.post_norm_1(self.attention(normed, cos, sin))
        if self.decoder.parallel:
            if not self.decoder.shared_norm:
                normed = self.norm_2(x)
            x = attended + x
        else:
            x = attended + x
            normed = self.norm_2(x)
        return self.post_norm_2(self.feed_forward(normed)) + x  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """The whole model; `forward` returns logits in chunks of tokens, or in one piece with `chunk` 0."""

    def __init__(self, decoder: Decoder, method: Method) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = method.linear(decoder.hidden, decoder.vocabulary, decoder.head_bias, "head")
        self.embedding = nn.Embedding(decoder.vocabulary, decoder.hidden)
        self.blocks = nn.ModuleList(Block(decoder, method, layer) for layer in range(decoder.layers))
        self.last_norm = _norm(decoder)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(method.trains(name))

    def rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the fp32 tables of angles that training starts with."""
        shape = (tokens, int(self.decoder.rotated * self.decoder.size_of_head))
        return torch.empty(shape, device="meta"), torch.empty(shape, device="meta")

    def forward(self, ids: Tensor, angles: tuple[Tensor, Tensor], *, chunk: int) -> list[Tensor]:
        cos, sin = (table[: ids.shape[1]] for table in angles)
        x = self.embedding(ids)
        if self.decoder.scaled_embedding:
            x = x * self.decoder.hidden**0.5
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.last_norm(x)
        return [self.head(part) for part in x.split(chunk, dim=1)] if chunk else [self.head(x)]
