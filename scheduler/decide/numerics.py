"""Precision, TF32, and which devices can take part: pinned once per study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.memory_ways import MemoryWay
from autosft.profiles.recipe import Method, Precision, why_not_trained
from autosft.studies.trial import PinnedSettings, TrainingSettings


def pin(
    settings: TrainingSettings,
    device: DeviceProfile,
    attention: str = "sdpa",
    *,
    padding_free: bool = False,
    precision: Precision | None = None,
) -> PinnedSettings:
    """Return the numerics that a study on this device would pin; evaluation settings are placeholders.

    `precision`: one that is asked for.
    """
    return PinnedSettings(
        precision=precision or pin_precision(device, settings.method),
        tf32=has_tf32(device),
        attention=attention,
        eval_seq_len=settings.seq_len,
        eval_micro_batch=0,
        eval_fingerprint="",
        num_evaluations=0,
        padding_free=padding_free,
    )


def pin_precision(device: DeviceProfile, method: Method) -> Precision:
    """Choose the study's precision for its weakest device.

    CPU: fp32, unless `cpu_precision` finds bf16 worthwhile.  GPUs: fp32 weights under autocast, since pure
    16-bit weights lose small updates; adapters over frozen 16-bit weights.  bf16 where the device has it,
    else fp16 with a loss scaler.
    """
    if not device.kind.traits.trains_in_16_bit:
        return Precision.FP32
    if method in (Method.LORA, Method.QLORA):
        return Precision.BF16 if device.supports_bf16 else Precision.FP16
    return Precision.BF16_AUTOCAST if device.supports_bf16 else Precision.FP16_AUTOCAST


def study_precision(asked: str, device: DeviceProfile, method: Method) -> Precision:
    """Return the precision that a study is pinned to; `asked` is "auto" or a precision's name.

    `device` is the study's least capable one.  Raises UserError for a precision that cannot be trained in.
    """
    precision = pin_precision(device, method) if asked == "auto" else Precision(asked)
    if reason := why_not_trained(method, precision):
        raise UserError(
            f"--method {method.value} --precision {precision.value}: {reason}.",
            remedy=f"Use --precision {Precision.BF16.value}."
            if precision.rounds_stochastically
            else f"Use --precision {Precision.FP16_AUTOCAST.value}, or --method lora: adapters are fp32.",
        )
    if precision.scales_loss and not device.kind.traits.has_loss_scaler:
        raise UserError(
            f"--precision {precision.value} needs a GPU: its loss scaler and its kernels are CUDA's.",
            remedy=f"On the CPU use {Precision.FP32.value}, {Precision.BF16_AUTOCAST.value} or "
            f"{Precision.BF16.value}.",
        )
    return precision


def least_capable(devices: Sequence[DeviceProfile]) -> DeviceProfile:
    """Return the device whose numerics all others support."""
    return min(devices, key=lambda device: (device.supports_bf16, device.compute_capability or (0, 0)))


def has_tf32(device: DeviceProfile) -> bool:
    """Whether a device multiplies fp32 matrices in TF32: NVIDIA's from compute capability 8.0 (Ampere) on."""
    return device.kind.traits.has_tf32(device.compute_capability)


def lacking(pinned: PinnedSettings, device: DeviceProfile, asked: Precision | None) -> str | None:
    """Return the precision that a device does not support; None if it does."""
    precision = asked or pinned.precision
    has_loss_scaler = device.kind.traits.has_loss_scaler
    is_able = {
        Precision.BF16: device.supports_bf16,
        Precision.BF16_STOCHASTIC: device.supports_bf16,
        Precision.BF16_AUTOCAST: device.supports_bf16,
        Precision.FP16_AUTOCAST: has_loss_scaler,
        Precision.FP16: has_loss_scaler,
        Precision.FP32: True,
    }
    return None if is_able[precision] else str(precision.value)


def pinned_on(
    pinned: PinnedSettings, device: DeviceProfile, asked: Precision | None
) -> tuple[PinnedSettings, tuple[str, ...]]:
    """Return the pinned settings as a device computes them, and what that changes in rounding."""
    said = []
    after = pinned
    if asked is not None and asked is not pinned.precision:
        after = replace(after, precision=asked)
        said.append(f"precision {pinned.precision.value} -> {asked.value}, as asked")
    if pinned.tf32 and not has_tf32(device):
        after = replace(after, tf32=False)
        if device.kind.traits.tf32_capability is not None:  # elsewhere there is nothing to turn off
            said.append("TF32 off: the device does not support it")
    return after, tuple(said)


def can_hold(way: MemoryWay, device: DeviceProfile) -> bool:
    """Whether a device computes in the precision of a way to hold what is trained; a CPU does, if slowly."""
    needs_bf16 = way.precision is not None and way.precision.has_bf16_weights
    return device.supports_bf16 or not needs_bf16 or not device.kind.traits.has_own_memory


def can_take_part(device: DeviceProfile, pinned: PinnedSettings, kind: DeviceKind) -> bool:
    """Whether a device computes as the study has pinned, so that scores stay comparable."""
    needs_bf16 = pinned.precision.has_bf16_weights or pinned.precision is Precision.BF16_AUTOCAST
    can_compute = (device.supports_bf16 or not needs_bf16) and (has_tf32(device) or not pinned.tf32)
    return device.kind is kind and can_compute
