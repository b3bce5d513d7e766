"""Create adapters on the meta device whose initialisation computes with values.

The values decide no shape (permutations, counts of indices, masks over weights), so that any values will do.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import KINDS
from autosft.profiles.recipe import AdapterSettings

aten = torch.ops.aten


class AnyValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Returns zeros where code reads values of meta tensors, and masks that select everything."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 0
        if func is aten.bincount.default and args[0].device.type == "meta":
            return args[0].new_empty(kwargs.get("minlength", 0))
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype is torch.bool:
            return args[0].new_empty((args[1][0].numel(), *args[0].shape[args[1][0].dim() :]))
        return func(*args, **kwargs)


def adapt(base: Any, adapter: AdapterSettings, config: Any, device: str) -> Any:
    """Return the model with peft's adapter, as after its move to the device.

    There each tensor has its own storage: slices of larger matrices do not keep these alive.
    Raises UserError for an adapter that does not fit the model's layers.
    """
    import peft

    reads_values = KINDS[adapter.kind].reads_values and device == "meta"
    values = AnyValues() if reads_values else contextlib.nullcontext()  # type: ignore[no-untyped-call]
    with torch.device(device), values, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's warnings about CUDA extensions that a trace does not need
        try:
            model = peft.get_peft_model(base, config)
        except ValueError as error:
            raise UserError(
                f"--adapter {adapter.kind} does not fit this model: {error}",
                remedy="Choose other --lora-targets, give it the options that it needs "
                "(--adapter KIND,NAME=VALUE), or choose another adapter.",
            ) from error
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.untyped_storage().nbytes() > tensor.nbytes:
                    tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model
