"""Build the optimizers of transformers' `optim` names on the meta device, with their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autosft.profiles.errors import UserError

#: bitsandbytes keeps one fp32 scale per block of this many 8-bit state values.
BLOCK_ELEMENTS = 256
#: bitsandbytes keeps the state of smaller parameters in fp32.
MIN_8BIT_ELEMENTS = 4096


class BlockwiseState(torch.optim.Optimizer):
    """Allocates the state of a bitsandbytes optimizer and nothing else: its kernels work in place.

    Paged optimizers keep large states in managed memory, outside the allocator.
    """

    def __init__(self, params: Any, *, moments: int, bits: int, paged: bool) -> None:
        super().__init__(params, {})
        self.moments, self.bits, self.paged = moments, bits, paged

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                count = parameter.numel()
                if self.paged and count >= 1e5:  # bitsandbytes' threshold for paging
                    self.state[parameter] = {"step": 0}
                    continue
                small = self.bits == 32 or count < MIN_8BIT_ELEMENTS
                state: dict[str, Any] = {"step": 1}
                for moment in range(1, self.moments + 1):
                    dtype = torch.float32 if small else torch.uint8
                    state[f"state{moment}"] = torch.zeros_like(parameter, dtype=dtype)
                    if not small:
                        blocks = -(-count // BLOCK_ELEMENTS)
                        state[f"absmax{moment}"] = parameter.new_zeros(blocks, dtype=torch.float32)
                self.state[parameter] = state


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer with this name.  Raises UserError if its memory is not known."""
    if name in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(groups, fused=True if name == "adamw_torch_fused" else None)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1e-3)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups)
    if name == "adagrad":
        return torch.optim.Adagrad(groups)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(
            groups, scale_parameter=False, relative_step=False, lr=1e-3
        )
        return adafactor
    blockwise = _BLOCKWISE.get(name)
    if blockwise is not None:
        moments, bits, paged = blockwise
        return BlockwiseState(groups, moments=moments, bits=bits, paged=paged)
    raise UserError(
        f"the memory of optimizer '{name}' is not known.",
        remedy="Choose one of: adamw_torch_fused, adamw_torch, sgd, rmsprop, adagrad, adafactor, "
        + ", ".join(sorted(_BLOCKWISE)),
    )


#: name -> (moments, bits per state value, paged), from bitsandbytes' optimizer classes
_BLOCKWISE = {
    "adamw_8bit": (2, 8, False),
    "adamw_bnb_8bit": (2, 8, False),
    "paged_adamw": (2, 32, True),
    "paged_adamw_32bit": (2, 32, True),
    "paged_adamw_8bit": (2, 8, True),
    "lion": (1, 32, False),
    "lion_32bit": (1, 32, False),
    "lion_8bit": (1, 8, False),
    "paged_lion": (1, 32, True),
    "paged_lion_32bit": (1, 32, True),
    "paged_lion_8bit": (1, 8, True),
    "rmsprop_bnb": (1, 32, False),
    "rmsprop_bnb_8bit": (1, 8, False),
    "rmsprop_bnb_32bit": (1, 32, False),
}
