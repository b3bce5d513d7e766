"""Emulate a real device for a step on meta tensors, operator by operator.

The meta device runs the real Python code of model, adapter, trainer and optimizer, but it has no autocast, no
fused attention kernels and no values.  `emulate` supplies what is missing:

- attention uses the kernel that `_fused_sdp_choice` picks on the device (`device_kernels`);
- autocast casts by the device's own list of operators, which CPU builds of torch contain too;
- dropout keeps a mask of one byte, as the fused CUDA kernel does;
- values that the code reads (is there padding? is this packed?) follow from the batch's description.

Memory that a kernel allocates and frees internally is recorded as scratch; its size comes from the kernel's
source, which is named next to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.memory.trace.device_kernels import KERNELS
from autosft.profiles.memory.trace.einsum import einsum_of_two

aten = torch.ops.aten

# Functions that autocast runs in 16 bits and in fp32 (torch.amp's documentation), with their operators; they
# count only where torch registers an autocast kernel for the operator, which differs between CUDA and CPU.
_LOWER_PRECISION = {
    "linear": "linear",
    "matmul": "matmul",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "baddbmm": "baddbmm",
    "einsum": "einsum",
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "prelu": "prelu",
    "scaled_dot_product_attention": "scaled_dot_product_attention",
}
_FULL_PRECISION = {
    "softmax": "softmax.int",
    "log_softmax": "log_softmax.int",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "group_norm": "group_norm",
    "pow": "pow.Tensor_Scalar",
    "__pow__": "pow.Tensor_Scalar",
    "__rpow__": "pow.Scalar",
    "rsqrt": "rsqrt",
    "exp": "exp",
    "expm1": "expm1",
    "log": "log",
    "log1p": "log1p",
    "reciprocal": "reciprocal",
    "sum": "sum",
    "cumsum": "cumsum",
    "prod": "prod",
    "norm": "norm.Scalar",
    "softplus": "softplus",
    "mse_loss": "mse_loss",
    "nll_loss": "nll_loss",
    "nll_loss_nd": "nll_loss_nd",
    "cross_entropy_loss": "cross_entropy_loss",
}


def autocast_policy(kind: DeviceKind) -> dict[str, bool]:
    """Return {function name: whether autocast runs it in 16 bits (else fp32)} for a device."""
    key = kind.traits.autocast_key
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    policy = {}
    for names, lower in ((_LOWER_PRECISION, True), (_FULL_PRECISION, False)):
        for name, operator in names.items():
            if has_kernel(f"aten::{operator}", key):
                policy[name] = lower
    return policy


class Autocast:
    """State of the emulated autocast: entered around a forward pass, left before the backward pass."""

    def __init__(self, dtype: torch.dtype | None, kind: DeviceKind) -> None:
        self.dtype = dtype
        self.active = False
        self.policy = autocast_policy(kind) if dtype is not None else {}
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Cast within the block; drop the 16-bit copies of weights at its end, as autocast's cache does."""
        if self.dtype is None or self.active:
            yield
            return
        self.active = True
        try:
            yield
        finally:
            self.active = False
            self._copies.clear()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Do not cast within the block, like `torch.autocast(..., enabled=False)`."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.cast(item, dtype) for item in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        # what autocast_mode.cpp caches
        is_kept = value.is_leaf and value.requires_grad and not value._is_view()
        if is_kept and dtype is self.dtype and value.dtype is torch.float32:
            if id(value) not in self._copies:
                self._copies[id(value)] = (value, value.to(dtype))
            return self._copies[id(value)][1]
        return value.to(dtype)


class _Functions(TorchFunctionMode):
    """Redirects torch functions: attention, autocast, dropout."""

    def __init__(self, kind: DeviceKind, capability: tuple[int, int], autocast: Autocast) -> None:
        super().__init__()
        self.kind = kind
        self.capability = capability
        self.autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.autocast.active:
            lower = self.autocast.policy.get(getattr(func, "__name__", ""))
            if lower is not None:
                dtype = self.autocast.dtype if lower else torch.float32
                assert dtype is not None
                args = self.autocast.cast(args, dtype)
                kwargs = {name: self.autocast.cast(value, dtype) for name, value in kwargs.items()}
        if func is torch.einsum and self.autocast.active and "einsum" not in self.autocast.policy:
            product = einsum_of_two(self._cast_product, *args, **kwargs)
            if product is not None:
                return product
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.kind.traits.has_fused_dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast_product(self, operand: torch.Tensor) -> torch.Tensor:
        """Cast an operand of a product, as autocast does."""
        dtype = self.autocast.dtype
        assert dtype is not None, "only while it is active"
        cast: torch.Tensor = self.autocast.cast(operand, dtype)
        return cast

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            # convert_boolean_attn_mask: at::where(mask, 0.0, -inf)
            attn_mask = attn_mask.new_empty(attn_mask.shape, dtype=query.dtype)
        output = KERNELS[self.kind].attention(
            query,
            key,
            value,
            attn_mask,
            capability=self.capability,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        if output is not None:
            return output[0]
        # No fused kernel applies: the plain formula, which stores the scores.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _dropout(value: torch.Tensor, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> Any:
    if not training or p == 0.0:
        return value
    return aten.native_dropout(value, p, True)[0]


@contextlib.contextmanager
def emulate(kind: DeviceKind, capability: tuple[int, int], autocast: Autocast) -> Iterator[None]:
    """Run the block as on a device of `kind` with compute capability `capability`."""

    def is_autocast_enabled(_: str | None = None) -> bool:
        return autocast.active

    def get_autocast_dtype(_: str) -> torch.dtype:
        return autocast.dtype or torch.float32

    def autocast_within(
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> Any:
        if device_type != "meta":
            return real_autocast(device_type, dtype, enabled, cache_enabled)
        return contextlib.nullcontext() if enabled else autocast.suspended()

    real_autocast = torch.autocast
    functions = _Functions(kind, capability, autocast)
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        # `backward` is a torch function, which disables the mode; checkpointed layers need it enabled.
        with functions if torch._C._len_torch_function_stack() == 0 else contextlib.nullcontext():
            return engine(*args, **kwargs)

    with (
        functions,
        mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
        mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
        mock.patch.object(torch, "get_autocast_dtype", get_autocast_dtype),
        mock.patch.object(torch, "autocast", autocast_within),
        _optimizer_kernels(kind),
        _trl_head(kind),
        _row_attention(has_kernel=kind.traits.has_flash_attention(capability)),
        _grouped_products(has_kernel=kind.traits.has_grouped_mm(capability)),
    ):
        yield


@contextlib.contextmanager
def _row_attention(*, has_kernel: bool) -> Iterator[None]:
    """Let packed rows of examples use the attention kernel that they use on the device.

    Processed one by one, examples allocate as many bytes as one example of their total length.
    """
    from autosft.profiles.memory.trace import row_attention

    def device_has_kernel(_: torch.device) -> bool:
        return has_kernel

    def one_example(_: torch.Tensor, num_tokens: int) -> list[int]:
        return [num_tokens]

    patch = mock.patch.object
    with (
        patch(row_attention, "has_kernel", device_has_kernel),
        patch(row_attention, "lengths_of", one_example),
    ):
        yield


@contextlib.contextmanager
def _grouped_products(*, has_kernel: bool) -> Iterator[None]:
    """Let experts' products use the grouped kernel, or transformers' loop where the device has none."""
    try:
        from transformers.integrations import moe
    except ImportError:
        yield
        return

    def can_use(*_: Any) -> bool:
        return has_kernel

    with mock.patch.object(moe, "_can_use_grouped_mm", can_use, create=True):
        yield


@contextlib.contextmanager
def _optimizer_kernels(kind: DeviceKind) -> Iterator[None]:
    """Let optimizers and gradient clipping choose fused and foreach kernels as they do on the device."""
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    def fused_devices() -> list[str]:
        return ["meta"]

    def foreach_devices() -> list[str]:
        return ["meta"]

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(optimizer, "_get_fused_kernels_supported_devices", fused_devices))
        # Clipping uses foreach on both; AdamW's default does so only on CUDA.
        stack.enter_context(patch(_foreach_utils, "_get_foreach_kernels_supported_devices", foreach_devices))
        if kind.traits.prefers_foreach:
            stack.enter_context(patch(optimizer, "_get_foreach_kernels_supported_devices", foreach_devices))
        yield


@contextlib.contextmanager
def _trl_head(kind: DeviceKind) -> Iterator[None]:
    """Let trl's chunked head take its Triton branch, without the kernels: they allocate nothing."""
    if not kind.traits.has_triton:
        yield
        return
    try:
        from trl.kernels import chunked_logprob
        from trl.trainer import utils
    except ImportError:
        yield
        return

    class NoKernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **__: None

    class Triton:
        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    original = chunked_logprob._addmm_fp32

    def addmm_fp32(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype in (torch.float16, torch.bfloat16):
            return  # torch.addmm(out=, out_dtype=torch.float32): in place, without a copy
        original(acc, a, b)

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(chunked_logprob, "triton", Triton, create=True))
        for name in ("_forward_kernel", "_backward_kernel"):
            stack.enter_context(patch(chunked_logprob, name, NoKernel()))
        stack.enter_context(patch(chunked_logprob, "_use_triton", lambda _: True))
        stack.enter_context(patch(utils, "_use_triton", lambda _: True))
        stack.enter_context(patch(chunked_logprob, "_addmm_fp32", addmm_fp32))
        yield
