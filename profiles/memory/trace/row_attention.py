"""Attention within each example of a packed row, without padding or a mask (padding-free training).

trl's collator concatenates the examples of a micro batch into one row with `padding_free`; `cu_seq_lens_q`
holds their starts.  It is registered with transformers as ROW_ATTENTION.  Padded batches (evaluations,
answers) use transformers' own SDPA.

- CUDA from compute capability 8.0 on, 16 bits: flash attention's kernel for variable lengths
  (`torch.nn.attention.varlen`), in one call.
- Elsewhere (CPU, fp32, older GPUs, attention with dropout): SDPA of one example at a time.

transformers' own approach with SDPA, a mask over the whole row, is quadratic in the row and not used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: transformers' attn_implementation; because of "sdpa" in it, classes without SDPA reject it themselves.
ROW_ATTENTION = "sdpa_padding_free"
#: The dtypes of flash attention's kernels.
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8


def attention_of_training(attention: str, *, padding_free: bool) -> str:
    """Return the attn_implementation that a model is loaded with."""
    if not padding_free:
        return attention
    assert attention == "sdpa", "refused when the study is planned"
    return ROW_ATTENTION


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention's output, (batch, seq, heads, head_dim), with transformers' interface.

    `query` is (batch, heads, seq, head_dim); `key` and `value` have as many heads or fewer; batch is 1 with
    `cu_seq_lens_q`.  Raises ValueError where the model needs more than causal attention within each example.
    """
    if cu_seq_lens_q is None:
        if _stands_for_row(attention_mask):
            raise ValueError(f"{type(module).__name__} does not get the starts of the examples in a row")
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    assert max_length_q is not None, "comes with cu_seq_lens_q"
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(f"an example of {max_length_q} tokens is longer than the window of {sliding_window}")
    if kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} adds to its attention's scores or caps them")
    for seen in _watching:
        seen.add(id(module))
    if takes_kernel(query, value, dropout):
        return by_kernel(query, key, value, cu_seq_lens_q, max_length=max_length_q, scaling=scaling), None
    return by_example(module, query, key, value, cu_seq_lens_q, dropout=dropout, scaling=scaling), None


def by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    *,
    max_length: int,
    scaling: float | None,
) -> torch.Tensor:
    """Compute the attention of all examples of the row in one call."""
    if torch.is_autocast_enabled(query.device.type):  # autocast does not cover the kernel
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, keys, values = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
    output = varlen_attn(
        rows,
        keys,
        values,
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(output, torch.Tensor), "no auxiliary outputs were asked for"
    return output.unsqueeze(0)


def by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Compute the attention of one example at a time, with SDPA's kernels for causal attention."""
    lengths = lengths_of(cu_seq_lens, query.shape[2])
    # `split`, not slices: its backward pass allocates one gradient for all parts, not a full one for each.
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, *part, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for part in parts
    ]
    return torch.cat(outputs, dim=1)


def takes_kernel(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Return whether flash attention's kernel for variable lengths runs on such tensors."""
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    size = query.shape[-1]
    return (
        dtype in (torch.bfloat16, torch.float16)
        and dropout == 0.0
        and size == value.shape[-1] <= MAX_HEAD_DIM
        and size % HEAD_DIM_MULTIPLE == 0
        and has_kernel(query.device)
    )


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Return whether a device has flash attention."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def lengths_of(cu_seq_lens: torch.Tensor, num_tokens: int) -> list[int]:
    """Return the lengths of a row's examples, which add up to `num_tokens`; synchronises with a GPU."""
    lengths: list[int] = cu_seq_lens.diff().tolist()
    assert sum(lengths) == num_tokens
    return lengths


def row_mask(
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return SDPA's mask for a padded batch; for a row an empty tensor, which only `row_attention` accepts.

    A row is recognised as transformers does it: there is no mask, and positions restart within it.
    """
    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1:
        if use_vmap:
            raise ValueError("the model needs a mask other than a causal one")
        return torch.empty(0, device=device)
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    return mask


#: For each active `attending`, the ids of the modules that have attended to rows.
_watching: list[set[int]] = []


@contextlib.contextmanager
def attending() -> Iterator[set[int]]:
    """Collect the ids of the modules that attend to rows within the block."""
    seen: set[int] = set()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def _stands_for_row(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.numel() == 0


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, row_mask)
