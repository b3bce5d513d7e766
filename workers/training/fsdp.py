"""Shard a model over the devices of a trial: FSDP2, as transformers applies it while loading.

accelerate's own FSDP silently trains replicas on the CPU, and its checkpoints can only be read by as many
processes as wrote them.  transformers shards at load time, each rank reading its part of the weights, and
gathers whole weights for a checkpoint; the optimizer's state, which it does not handle, is handled here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from autosft.profiles.errors import UserError
from autosft.profiles.optimizers import why_not_sharded
from autosft.profiles.recipe import (
    Sharding,
    adapter_kind,
    why_tie_not_sharded,
)
from autosft.studies.trial import ExecutionPlan, TrialJob


def sharding_of(job: TrialJob) -> DistributedConfig | None:
    """Return how `from_pretrained` shards the model of a job, None for a whole model on every device.

    Raises UserError for what FSDP2 cannot shard.
    """
    if job.plan.sharding is not Sharding.FSDP:
        return None
    kind = adapter_kind(job.settings.adapter)
    if reason := why_not_sharded(job.settings.method, job.pinned.precision, job.settings.optimizer, kind):
        raise UserError(f"{reason}.", remedy="Train it on one device, or as replicas.")
    return DistributedConfig(
        fsdp_size=job.plan.data_parallel,
        # 16-bit gradients are summed in fp32; those of fp32 weights are fp32 anyway, autocast or not.
        fsdp_mixed_precision=job.pinned.precision.has_bf16_weights,
    )


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def assert_distributed(model: Any, plan: ExecutionPlan) -> None:
    """Assert that the model in training is replicated or sharded as planned."""
    is_replicated = isinstance(model, DistributedDataParallel)
    assert is_replicated == (plan.sharding is Sharding.DDP), f"{type(model).__name__}: not as planned"
    for name, parameter in model.named_parameters():
        if plan.sharding is Sharding.FSDP and "lora_" not in name:  # adapters are small: replicated
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            num_rows = -(-len(parameter) // plan.data_parallel)
            assert len(parameter.to_local()) <= num_rows, f"{name} is not split in {plan.data_parallel}"
            is_embedding = parameter.requires_grad and parameter is model.get_output_embeddings().weight
            if is_embedding and parameter is model.get_input_embeddings().weight:
                assert not (reason := why_tie_not_sharded(len(parameter), plan.data_parallel)), reason


def gather_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of a sharded optimizer as a single process would have it, in host memory.

    All ranks take part, one tensor at a time; only rank 0 keeps the result.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None

    saved: dict[str, Any] = optimizer.state_dict()  # its inner dictionaries are the optimizer's own
    state = {
        index: {name: whole(value) for name, value in held.items()} for index, held in saved["state"].items()
    }
    return {**saved, "state": state}


def shard_optimizer_state(whole: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return this rank's shard of a state that `gather_optimizer_state` or a single process saved."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in whole["state"].items():
        parameter = parameters[index]
        for name, value in state.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                # All ranks read the same file, so that nothing has to be sent.
                state[name] = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
    return whole
