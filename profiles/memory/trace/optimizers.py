"""The optimizers of transformers' `optim` names, as far as their memory goes, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autosft.profiles.optimizers import Optimizer, State, find_optimizer

#: bitsandbytes moves the state of larger parameters to managed memory, which the allocator does not see.
MIN_PAGED_VALUES = 100_000
#: What torchao's step makes on a CPU to round a bf16 weight at random: three numbers of 32 bits (the random
#: one, and the two that it chooses from) and whether to round up.
ROUNDING_BYTES = 3 * 4 + 1


class KeptState(torch.optim.Optimizer):
    """Keeps the state of an optimizer, and makes what its step makes on its way.

    `embeddings`: the ids of the weights that are embeddings, whose state some keep whole.
    """

    def __init__(
        self,
        params: Any,
        row: Optimizer,
        embeddings: frozenset[int] = frozenset(),
        *,
        on_cpu: bool,
        rounds_stochastically: bool = False,
    ) -> None:
        assert row.state is not None, "a refused optimizer keeps nothing"
        super().__init__(params, {})
        self.row, self.kept, self.embeddings = row, row.state, embeddings
        self.shared: torch.Tensor | None = None
        self.cpu_copies = row.cpu_copies if on_cpu else 0
        self.rounding_bytes = ROUNDING_BYTES if on_cpu and rounds_stochastically else 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._state_of(parameter)
            made: list[torch.Tensor] = []
            for parameter in group["params"]:
                if not self.row.copies_all:
                    made.clear()
                if parameter.grad is not None:
                    made += [torch.empty_like(parameter) for _ in range(self.row.copies)]
                    made += [torch.empty_like(parameter, dtype=torch.float32) for _ in range(self.cpu_copies)]
                    if self.rounding_bytes and parameter.dtype is torch.bfloat16:
                        made.append(_bytes(parameter, self.rounding_bytes * parameter.numel()))

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        kept, count = self.kept, parameter.numel()
        state: dict[str, Any] = {"step": 0}
        if self.row.pages and count >= MIN_PAGED_VALUES:
            return state
        if kept.is_quantized(count, is_embedding=id(parameter) in self.embeddings):
            state |= _quantized(parameter, kept)
            if kept.shared_table_bytes and self.shared is None:
                self.shared = _bytes(parameter, kept.shared_table_bytes)
                state["shared"] = self.shared
        else:
            dtype = parameter.dtype if kept.bits is None or kept.whole_bits is None else torch.float32
            for moment in range(kept.moments):
                state[f"state{moment}"] = torch.zeros_like(parameter, dtype=dtype)
            if kept.compensates and parameter.itemsize == 2:
                state["compensation"] = torch.zeros_like(parameter)
        if beside := kept.scalar_bytes + kept.scalars * parameter.itemsize:
            state["scalar"] = _bytes(parameter, beside)
        return state


def _quantized(parameter: torch.Tensor, kept: State) -> dict[str, torch.Tensor]:
    assert kept.bits is not None
    count = parameter.numel()
    state = {}
    for moment in range(kept.moments):
        state[f"state{moment}"] = _bytes(parameter, count * kept.bits // 8)
        state[f"scale{moment}"] = parameter.new_zeros(-(-count // kept.block), dtype=torch.float32)
    if kept.table_bytes:
        state["table"] = _bytes(parameter, kept.table_bytes)
    return state


def _bytes(like: torch.Tensor, count: int) -> torch.Tensor:
    return like.new_zeros(count, dtype=torch.uint8)


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    model: nn.Module,
    *,
    on_cpu: bool,
    rounds_stochastically: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer of that name; raises UserError for one that is unknown or refused."""
    row = find_optimizer(name)
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
    embeddings = frozenset(id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding))
    return KeptState(groups, row, embeddings, on_cpu=on_cpu, rounds_stochastically=rounds_stochastically)
