"""Model bitsandbytes' 4-bit layers by the buffers that they hold and allocate.

bitsandbytes' own layer needs a quantised weight, which cannot be created on the meta device.  The model
follows its `Linear4bit` and `matmul_4bit` (bitsandbytes 0.50) with NF4 and double quantisation, as
`workers.training` configures it: two weights per byte, one byte per block of 64 for its scale, fp32 scales
for blocks of 256 of those; forward and backward each dequantise the whole weight to its original precision,
use it in the precision of the input, and drop it.  peft copies the output of a 4-bit layer.
"""

from __future__ import annotations

from typing import Any

import torch

from autosft.profiles.model.adapted_layers import read_directly

BLOCK_WEIGHTS = 64
NESTED_BLOCKS = 256


def quantize_linears(model: Any, *, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on the meta device, except its output head and `read_directly`."""
    head, kept = model.get_output_embeddings(), {*read_directly(model)}
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            is_kept = child is head or f"{path}.{name}" in kept
            if type(child) is torch.nn.Linear and not is_kept:
                setattr(module, name, ModelledLinear4bit(child, compute_dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)


class ModelledLinear4bit(torch.nn.Linear):
    """Allocates what a 4-bit linear layer allocates."""

    def __init__(self, layer: torch.nn.Linear, compute_dtype: torch.dtype) -> None:
        count = layer.weight.numel()
        blocks = -(-count // BLOCK_WEIGHTS)
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.original_dtype, self.compute_dtype = layer.weight.dtype, compute_dtype
        packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        sizes = {
            "absmax": (blocks, torch.uint8),
            "nested_absmax": (-(-blocks // NESTED_BLOCKS), torch.float32),
            "code": (16, torch.float32),
            "nested_code": (256, torch.float32),
            "offset": (1, torch.float32),
        }
        for name, (length, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(length, dtype=dtype, device="meta"), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        compute = input.to(self.compute_dtype)
        output = _Matmul4bit.apply(compute, self)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.to(input.dtype).clone()  # type: ignore[no-any-return]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        num_blocks = -(-self.in_features * self.out_features // BLOCK_WEIGHTS)
        scales = torch.empty(num_blocks, dtype=torch.float32, device="meta")
        shape = (self.out_features, self.in_features)
        weight = torch.empty(shape, dtype=self.original_dtype, device="meta")
        del scales
        return weight.to(dtype)


class _Matmul4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: ModelledLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(input, layer.dequantized(input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return torch.matmul(gradient, ctx.layer.dequantized(gradient.dtype)), None
