"""Devices that are not there."""

from __future__ import annotations

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile

GIB = 1 << 30


def gpu(index: int = 0, *, free_bytes: int = 24 * GIB, flops: float = 1e14) -> DeviceProfile:
    return DeviceProfile(
        uuid=f"GPU-{index}",
        kind=DeviceKind.CUDA,
        name="Some GPU",
        node="here",
        index=index,
        total_bytes=24 * GIB,
        free_bytes=free_bytes,
        compute_capability=(8, 6),
        supports_bf16=True,
        num_cores=82,
        matmul_flops_per_s=flops,
        memory_bytes_per_s=9e11,
        rates_measured=False,
        context_bytes=300 << 20,
        is_mig=False,
        is_assumed=False,
        power_limit_w=None,
        temperature_c=None,
        throttle_reasons=(),
        processes=(),
    )
