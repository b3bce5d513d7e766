"""Predict the time of one operation on a device: a matrix product, memory traffic, a chain of kernels.

The roofline model (Williams, Waterman, Patterson 2009) with three ceilings: arithmetic, memory traffic,
and, for small pieces of work, the rate at which Python can launch kernels.  The rates are this machine's
if it has been measured (`profiles.hardware.benchmark`), else those of the device's row in data/devices.json.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.hardware.known_devices import known_device_of

# Share of the vendor's dense peak that the largest products reach on cards without a measurement: the median
# of the measured rows in data/devices.json.
TYPICAL_MATMUL_SHARE = 0.8
# Large copies reach 80 to 93 % of the datasheet's bandwidth on GPUs with GDDR or HBM (BabelStream results,
# Deakin et al. 2018); elementwise kernels of a model are at the lower end.
MEMORY_SHARE = 0.8
# Speed of fused attention relative to large products, forward and backward, at long lengths, and the length
# at which it reaches half of that: FlashAttention-2 (Dao 2023, figures 4-6) on an A100 goes from 40 % of the
# peak at 512 to 73 % forward, from 30 to 63 % backward.
ATTENTION_FORWARD_SHARE = 0.85
ATTENTION_BACKWARD_SHARE = 0.7
ATTENTION_HALF_LENGTH = 600
# One operator of an eager PyTorch program from Python (dispatch, autograd, launch), and from the backward's
# C++ thread; 5 to 15 us on server CPUs ("Making deep learning go brrrr", He 2022).
FORWARD_OP_S = 10e-6
BACKWARD_OP_S = 7e-6
# On a CPU an operator also allocates and touches memory, a cost per micro batch that does not depend on its
# size: fitted to the twelve trials of benchmarks/run_time_accuracy.py on one core of an AMD EPYC.
CPU_OP_RATIO = 2.0
# Tiles that cuBLAS chooses from (CUTLASS's defaults), and the share of the peak that each reaches.
_TILES = ((256, 128, 1.0), (128, 128, 0.97), (128, 64, 0.85), (64, 64, 0.65))
_SPLITS = (1, 2, 4, 8)  # of the inner dimension, where there are too few tiles to fill the device
_MIN_SPLIT = 512
# A core without a measurement: 8 to 16 fp32 lanes at 2-3 GHz, half used.
DEFAULT_CORE_FLOPS_PER_S = 5e10
#: Products of bf16 numbers over fp32's on a CPU that has instructions for them, without a measurement:
#: vdpbf16ps multiplies and adds twice as many pairs as an fp32 instruction of its width (Intel's intrinsics
#: guide); measured 2.5 times as fast on an AMD EPYC.
BF16_OVER_FP32 = 2.0
DEFAULT_CORE_BYTES_PER_S = 8e9
DEFAULT_CORE_REUSED_BYTES_PER_S = 16e9
#: On a CPU, results of at least this size get new pages every time: malloc returns them
#: (`workers.processes`).
RETURNED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The rates that a device reaches on large operations, and the costs of small ones."""

    matmul_flops_per_s: float
    memory_bytes_per_s: float
    reused_bytes_per_s: float  # on a CPU, for memory that is reused; else the same
    num_sms: int  # 0: no tiles to fill (CPU)
    launches_overlap: bool  # whether kernels run while Python goes on (CUDA)
    is_assumed: bool  # nothing is known about this device


def rates_of(device: DeviceProfile, *, num_threads: int | None = None, is_fp32: bool = False) -> Rates:
    """Return the rates of a device, or of `num_threads` of a CPU's cores.

    `is_fp32`: products of fp32 numbers take TF32 tensor cores of a GPU, half the 16-bit rate; a CPU that
    multiplies bf16 in hardware has a rate for each.
    """
    if device.traits.is_split_by_cores:
        return _core_rates(device, num_threads, is_fp32=is_fp32)
    return _gpu_rates(device, is_fp32=is_fp32)


def _core_rates(device: DeviceProfile, num_threads: int | None, *, is_fp32: bool) -> Rates:
    """Return the rates of so many of a CPU's cores, None for all of them."""
    cores = max(1, device.num_cores)
    share = min(1.0, (num_threads or cores) / cores)
    core_flops = device.matmul_flops_per_s or cores * DEFAULT_CORE_FLOPS_PER_S
    if not is_fp32 and device.supports_bf16:
        core_flops = device.bf16_flops_per_s or BF16_OVER_FP32 * core_flops
    return Rates(
        matmul_flops_per_s=core_flops * share,
        memory_bytes_per_s=(device.memory_bytes_per_s or cores * DEFAULT_CORE_BYTES_PER_S) * share,
        reused_bytes_per_s=(device.reused_bytes_per_s or cores * DEFAULT_CORE_REUSED_BYTES_PER_S) * share,
        num_sms=0,
        launches_overlap=False,
        is_assumed=device.matmul_flops_per_s is None,
    )


def _gpu_rates(device: DeviceProfile, *, is_fp32: bool) -> Rates:
    """Return the rates of a GPU: measured, else the datasheet's at the share that is usually reached."""
    known = known_device_of(device.name)
    flops = device.matmul_flops_per_s
    if flops is not None and not device.rates_measured:
        flops *= known.matmul_share if known is not None else TYPICAL_MATMUL_SHARE
    memory = device.memory_bytes_per_s
    if memory is not None and not device.rates_measured:
        memory *= MEMORY_SHARE
    return Rates(
        # Unknown: assume a small card of 2020, so that plans err on the slow side.
        matmul_flops_per_s=(flops or 20e12) / (2 if is_fp32 else 1),
        memory_bytes_per_s=memory or 200e9,
        reused_bytes_per_s=memory or 200e9,
        num_sms=device.num_cores,
        launches_overlap=True,
        is_assumed=flops is None or memory is None,
    )


def matmul_s(rates: Rates, m: float, n: float, k: float, *, element_bytes: int) -> float:
    """Return the seconds of a product (m, k) x (k, n).

    Arithmetic runs at the share of the peak that whole tiles and whole waves of tiles keep busy.
    """
    if min(m, n, k) <= 0:
        return 0.0
    share = _busy_share(math.ceil(m), math.ceil(n), math.ceil(k), rates.num_sms) if rates.num_sms else 1.0
    arithmetic_s = 2.0 * m * n * k / (rates.matmul_flops_per_s * share)
    traffic_s = element_bytes * (m * k + k * n + m * n) / rates.reused_bytes_per_s
    return max(arithmetic_s, traffic_s)


def operators_s(rates: Rates, num_bytes: float, *, result_bytes: float) -> float:
    """Return the seconds of elementwise operators that move `num_bytes`, with results of `result_bytes`."""
    is_new = result_bytes >= RETURNED_BYTES
    return num_bytes / (rates.memory_bytes_per_s if is_new else rates.reused_bytes_per_s)


@functools.lru_cache(maxsize=4096)
def _busy_share(m: int, n: int, k: int, num_sms: int) -> float:
    """Return the best share of the peak over tile shapes and splits (tile and wave quantization)."""
    best = 0.0
    for rows, columns, tile_share in _TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        filled = m * n / (tiles * rows * columns)
        for split in _SPLITS:
            if split > 1 and k / split < _MIN_SPLIT:
                break
            blocks = tiles * split
            waves = blocks / (math.ceil(blocks / num_sms) * num_sms)
            best = max(best, tile_share * filled * waves * (1.0 if split == 1 else 0.9))
    return best
