"""Everything that kinds of devices do differently, as one row of facts each.

No other module asks which kind a device is: it reads a trait of the kind (`device.kind.traits`), so that the
branch names its reason.  CONTRIBUTING.md lists what another kind of accelerator needs besides a row here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

#: Capability of CUDA devices: (major, minor), for example (8, 0) for an A100.
Capability = tuple[int, int]

#: cuBLAS allocates one workspace for the forward and one for the backward thread: 8.125 MiB each, 32 MiB
#: from Hopper on (CUDABlas.cpp, parseChosenWorkspaceSize).
CUBLAS_BYTES = 8_519_680
CUBLAS_HOPPER_BYTES = 32 << 20
#: NCCL's buffers per process group: 544-688 MB were measured on eight GPUs (docs/memory.md).
NCCL_BYTES = 640 << 20
#: Resident memory of a CPU trial beyond its live tensors, with our malloc settings; 68 MiB of it are pages of
#: libraries (benchmarks/hard_limits.py).
CPU_CONSTANT_BYTES = 76 << 20


class DeviceKind(enum.Enum):
    """A kind of device that trials run on."""

    CUDA = "cuda"  #: an NVIDIA GPU or a MIG slice of one
    CPU = "cpu"  #: a share of this machine's cores and RAM

    @property
    def traits(self) -> DeviceTraits:
        """What devices of this kind do differently from others."""
        return _TRAITS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTraits:
    """Facts about a kind of device."""

    #: What messages call such a device.
    label: str
    #: `torch.device.type`.
    torch_name: str
    #: How the UUIDs of such devices begin.
    uuid_prefixes: tuple[str, ...]
    #: Whether it is an accelerator, which `--gpus` and `--num-gpus` select among.
    is_gpu: bool
    #: Whether NVML reports its state (memory, clocks, links).
    has_nvml: bool

    # How trials share a device

    #: Whether each trial gets cores of its own: trials then neither slow one another down nor share a slot.
    is_split_by_cores: bool
    #: Whether its memory is separate from the host's RAM, with a hard limit that the allocator enforces.
    has_own_memory: bool
    #: How much of the free memory trials may use, in percent.
    usable_percent: int

    # Numerics

    #: Whether trials use 16-bit arithmetic; elsewhere the memory of 16-bit kernels is not predicted.
    trains_in_16_bit: bool
    #: Whether fp16 training, which needs a loss scaler, is possible.
    has_loss_scaler: bool
    #: The first capability that multiplies fp32 matrices in TF32; None where no such device does.
    tf32_capability: Capability | None
    #: Whether bitsandbytes' optimizers run on it.
    has_bitsandbytes: bool

    # Several devices

    #: Whether plans consider several of them for one trial.
    forms_gangs: bool
    #: The backend of torch.distributed.
    collective_backend: str
    #: Size of the message that measures an all-reduce (a DDP bucket is 25 MiB; larger ones saturate links).
    all_reduce_message_bytes: int
    #: What the backend's process group allocates on each device.
    collective_bytes: int

    # Memory model

    #: Whether tensors come from torch's caching allocator, whose segments and fragmentation are replayed.
    has_caching_allocator: bool
    #: What a trial takes beyond its live tensors and the device's context.
    constant_bytes: int
    #: What is added to upper bounds without runs of the same stack to calibrate with, and with them.
    spread_bytes: int
    calibrated_spread_bytes: int
    #: Workspaces of the BLAS library: ((least capability, bytes), ...), highest capability first.
    workspaces: tuple[tuple[Capability, int], ...]
    #: What the names of stacks in calibration rows begin with; stored in databases.
    stack_prefix: str
    #: Workspace in the closed form.
    closed_form_workspace_bytes: int
    #: Whether attention expands its mask to fp32 scores of one layer.
    expands_attention_mask: bool

    # Kernels

    #: torch's dispatch key of autocast.
    autocast_key: str
    #: Whether Triton kernels run: trl's head uses them, and Liger's losses need them.
    has_triton: bool
    #: The first capability with flash attention and with grouped matrix products; None: no capability has it.
    flash_capability: Capability | None
    grouped_mm_capability: Capability | None
    #: Capabilities that differ in the kernels of a step, highest first; empty where there is no capability.
    traced_capabilities: tuple[Capability, ...]
    #: Whether dropout is one fused kernel that keeps a mask of one byte an element.
    has_fused_dropout: bool
    #: Whether optimizers use foreach kernels unless told otherwise.
    prefers_foreach: bool

    def has_flash_attention(self, capability: Capability | None) -> bool:
        """Return whether a device of this capability has flash attention's kernels."""
        return _reaches(capability, self.flash_capability)

    def has_grouped_mm(self, capability: Capability | None) -> bool:
        """Return whether a device of this capability multiplies groups of rows in one kernel."""
        return _reaches(capability, self.grouped_mm_capability)

    def has_tf32(self, capability: Capability | None) -> bool:
        """Return whether a device of this capability multiplies fp32 matrices in TF32."""
        return _reaches(capability, self.tf32_capability)

    def workspace_bytes(self, capability: Capability | None) -> int:
        """Return the bytes of one BLAS workspace, 0 where there is none."""
        return next((size for least, size in self.workspaces if (capability or (0, 0)) >= least), 0)

    def traced_capability(self, capability: Capability | None) -> Capability | None:
        """Return the capability that a step is traced for: one trace serves all with the same kernels.

        An unknown capability counts as the highest.
        """
        if capability is None or not self.traced_capabilities:
            return next(iter(self.traced_capabilities), capability)
        lowest = self.traced_capabilities[-1]
        return next((least for least in self.traced_capabilities if capability >= least), lowest)


def _reaches(capability: Capability | None, least: Capability | None) -> bool:
    return least is not None and (capability or (0, 0)) >= least


def kind_of_uuid(uuid: str) -> DeviceKind:
    """Return the kind of the device with this UUID; CUDA for UUIDs that no kind claims."""
    return _kind_by_prefix(uuid, {kind: kind.traits.uuid_prefixes for kind in DeviceKind})


def kind_of_stack(stack: str) -> DeviceKind:
    """Return the kind of device that a calibration row's stack names; CUDA's have no prefix."""
    prefixes = {kind: (kind.traits.stack_prefix,) for kind in DeviceKind if kind.traits.stack_prefix}
    return _kind_by_prefix(stack, prefixes)


def _kind_by_prefix(text: str, prefixes: Mapping[DeviceKind, tuple[str, ...]]) -> DeviceKind:
    return next((kind for kind, starts in prefixes.items() if text.startswith(starts)), DeviceKind.CUDA)


_TRAITS = {
    DeviceKind.CUDA: DeviceTraits(
        label="GPU",
        torch_name="cuda",
        uuid_prefixes=("GPU-", "MIG-"),
        is_gpu=True,
        has_nvml=True,
        is_split_by_cores=False,
        has_own_memory=True,
        usable_percent=100,
        trains_in_16_bit=True,
        has_loss_scaler=True,
        tf32_capability=(8, 0),  # Ampere
        has_bitsandbytes=True,
        forms_gangs=True,
        collective_backend="nccl",
        all_reduce_message_bytes=256 << 20,
        collective_bytes=NCCL_BYTES,
        has_caching_allocator=True,
        constant_bytes=0,
        spread_bytes=2 << 20,
        calibrated_spread_bytes=2 << 20,
        workspaces=(((9, 0), CUBLAS_HOPPER_BYTES), ((0, 0), CUBLAS_BYTES)),
        stack_prefix="",
        closed_form_workspace_bytes=9 << 20,
        expands_attention_mask=False,
        autocast_key="AutocastCUDA",
        has_triton=True,
        flash_capability=(8, 0),
        grouped_mm_capability=(8, 0),
        traced_capabilities=((8, 0), (7, 0)),
        has_fused_dropout=True,
        prefers_foreach=True,
    ),
    DeviceKind.CPU: DeviceTraits(
        label="CPU",
        torch_name="cpu",
        uuid_prefixes=("CPU-",),
        is_gpu=False,
        has_nvml=False,
        is_split_by_cores=True,
        has_own_memory=False,
        usable_percent=90,  # RAM has no wall: other programs need some of it
        trains_in_16_bit=False,
        has_loss_scaler=False,
        tf32_capability=None,
        has_bitsandbytes=False,
        forms_gangs=False,
        collective_backend="gloo",
        all_reduce_message_bytes=16 << 20,
        collective_bytes=0,
        has_caching_allocator=False,
        constant_bytes=CPU_CONSTANT_BYTES,
        spread_bytes=32 << 20,  # libraries' own buffers, malloc's heap (benchmarks/hard_limits.py)
        calibrated_spread_bytes=16 << 20,  # of the same stack, only what differs between models is unknown
        workspaces=(),
        stack_prefix="CPU ",
        closed_form_workspace_bytes=24 << 20,
        expands_attention_mask=True,
        autocast_key="AutocastCPU",
        has_triton=False,
        flash_capability=None,
        grouped_mm_capability=(0, 0),
        traced_capabilities=(),
        has_fused_dropout=False,
        prefers_foreach=False,
    ),
}
