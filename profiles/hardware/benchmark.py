"""Measure this machine: arithmetic, memory and link rates, and the memory of a process's device context.

Measuring runs in a separate process, so that the caller never touches CUDA.  It takes a few seconds per
device; results are cached in the user's cache folder until the device, its driver or torch changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind, DeviceProfile
from autosft.profiles.own_folders import cache_folder

TIMEOUT_S = 120
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRates:
    """Measured rates of one device; None where a rate does not apply to it."""

    matmul_flops_per_s: float  # 16-bit on GPUs, fp32 on CPUs (all cores): the best of a few sizes
    memory_bytes_per_s: float  # read plus written: a large copy on GPUs, on CPUs an operator that allocates
    context_bytes: int
    host_link_bytes_per_s: float | None  # pinned host memory to the device
    link_bytes_per_s: float | None  # to the next GPU of the node
    reused_bytes_per_s: float | None = None  # CPUs: an operator whose small result reuses freed memory
    bf16_flops_per_s: float | None = None  # CPUs that multiply bf16 in hardware
    all_reduce_bytes_per_s: float | None = None  # bus bandwidth over all measured GPUs, see `all_reduce`


def with_measured_rates(cluster: ClusterProfile, *, cache: Path | None = None) -> ClusterProfile:
    """Return the cluster with the cached rates of this machine's devices; measures nothing."""
    known = _read_cache(_cache_file(cache))
    return replace(cluster, devices=tuple(_merged(d, known.get(_key(cluster, d))) for d in cluster.devices))


def measure_cluster(
    cluster: ClusterProfile,
    *,
    cache: Path | None = None,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ClusterProfile:
    """Measure the devices of this machine in turn, cache the rates, and return the cluster with them.

    Assumed devices and those of other nodes are unchanged.  `environment` holds the variables that trials get
    in addition to this process's: malloc's settings decide a CPU's memory rate.  `say` receives a progress
    message per measurement.  Raises UserError when a device cannot be measured.
    """
    from autosft.profiles.hardware.host import host_name

    file = _cache_file(cache)
    here = [d for d in cluster.devices if not d.is_assumed and d.node == host_name()]
    gpus = [d for d in here if d.traits.is_gpu]
    measured: dict[str, MeasuredRates] = {}
    for device in here:
        say(f"Measuring {device.name} ({device.uuid}) ...")
        peer = next((d for d in gpus if d.uuid != device.uuid and not d.is_mig), None)
        measured[_key(cluster, device)] = measure(
            device, peer=None if device.is_mig else peer, environment=environment
        )
    whole = [gpu for gpu in gpus if not gpu.is_mig]
    if len(whole) > 1:
        say(f"Measuring an all-reduce over {len(whole)} GPUs ...")
        rate = measure_all_reduce(whole[0].kind, [gpu.uuid for gpu in whole])
        for gpu in whole:
            key = _key(cluster, gpu)
            measured[key] = replace(measured[key], all_reduce_bytes_per_s=rate)
    if measured:
        _write_cache(file, _read_cache(file) | {key: asdict(rates) for key, rates in measured.items()})
    return with_measured_rates(cluster, cache=cache)


def unmeasured(cluster: ClusterProfile) -> tuple[DeviceProfile, ...]:
    """Return the devices of this machine that have not been measured."""
    from autosft.profiles.hardware.host import host_name

    here = host_name()
    return tuple(d for d in cluster.devices if not (d.is_assumed or d.rates_measured) and d.node == here)


def measure(
    device: DeviceProfile,
    *,
    peer: DeviceProfile | None = None,
    environment: Mapping[str, str] | None = None,
) -> MeasuredRates:
    """Measure one device of this machine in a process that sees only this GPU, and `peer` for their link."""
    seen = [] if not device.traits.is_gpu else [gpu.uuid for gpu in (device, peer) if gpu is not None]
    answer = _answer_of_process(
        "autosft.profiles.hardware.benchmark",
        (device.kind.value, str(device.num_cores)),
        what=device.name,
        seen=seen,
        environment=environment,
    )
    return MeasuredRates(**json.loads(answer))


def measure_all_reduce(kind: DeviceKind, uuids: Sequence[str]) -> float:
    """Return the bus bandwidth of an all-reduce over devices of this machine, in bytes per second.

    One direction, per device, as nccl-tests defines it; over NCCL (gloo between CPU processes).  Raises
    UserError when it cannot be measured.
    """
    answer = _answer_of_process(
        "autosft.profiles.hardware.all_reduce",
        (kind.value, str(len(uuids))),
        what=f"An all-reduce over {len(uuids)} devices",
        seen=uuids if kind.traits.is_gpu else (),
    )
    return float(json.loads(answer))


def _answer_of_process(
    module: str,
    arguments: Sequence[str],
    *,
    what: str,
    seen: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a module in a process that sees only the GPUs `seen`; return the last line that it prints."""
    remedy = "Is the GPU free, and this torch built for it? Without a measurement, datasheet rates are used."
    try:
        done = subprocess.run(
            python("-m", module, *arguments),
            env={**os.environ, **(environment or {}), "CUDA_VISIBLE_DEVICES": ",".join(seen)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{what} was not measured within {TIMEOUT_S} s.", remedy=remedy) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{what} cannot be measured: {reason}.", remedy=remedy)
    return done.stdout.splitlines()[-1]


def _merged(device: DeviceProfile, rates: dict[str, Any] | None) -> DeviceProfile:
    if rates is None or device.is_assumed:
        return device
    measured = MeasuredRates(**rates)
    return replace(
        device,
        matmul_flops_per_s=measured.matmul_flops_per_s,
        memory_bytes_per_s=measured.memory_bytes_per_s,
        context_bytes=measured.context_bytes,
        host_link_bytes_per_s=measured.host_link_bytes_per_s or device.host_link_bytes_per_s,
        link_bytes_per_s=measured.link_bytes_per_s or device.link_bytes_per_s,
        reused_bytes_per_s=measured.reused_bytes_per_s,
        bf16_flops_per_s=measured.bf16_flops_per_s,
        all_reduce_bytes_per_s=measured.all_reduce_bytes_per_s,
        rates_measured=True,
    )


def _key(cluster: ClusterProfile, device: DeviceProfile) -> str:
    """Return the cache key of a device's rates: they depend on driver, torch and number of cores."""
    return " | ".join(
        (device.uuid, device.name, str(device.num_cores), str(cluster.driver_version), version("torch"))
    )


def _cache_file(folder: Path | None) -> Path:
    return (folder if folder is not None else cache_folder()) / "measured_rates.json"


def _read_cache(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or corrupt: it is only a cache
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(file: Path, known: dict[str, dict[str, Any]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise UserError(
            f"The measured rates cannot be saved in {file}: {error.strerror}.",
            remedy="Make the folder writable, or set XDG_CACHE_HOME.",
        ) from None


# What runs in the measuring process


def main(arguments: Sequence[str]) -> None:
    """Measure the device that this process sees and print the rates as one line of JSON."""
    kind, num_cores = DeviceKind(arguments[0]), int(arguments[1])
    rates = _MEASURES[kind](num_cores)
    sys.stdout.write(json.dumps(asdict(rates)) + "\n")


def _measure_cpu(num_cores: int) -> MeasuredRates:
    import torch

    from autosft.profiles.hardware.host import profile_host

    torch.set_num_threads(max(1, num_cores))

    def core_s() -> float:
        """Return processor seconds per core, which other programs do not affect."""
        return time.process_time() / max(1, num_cores)

    def nothing() -> None: ...

    def products(dtype: torch.dtype) -> float:
        """Return the flops per second of the best of a few sizes."""
        best = 0.0
        for size in (512, 1024):
            left, right = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
            out = torch.empty(size, size, dtype=dtype)
            seconds = _fastest(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), nothing, core_s)  # type: ignore[misc]
            best = max(best, 2 * size**3 / seconds)
        return best

    # Operators allocate their results; where malloc gets fresh pages for each, the kernel has to clear them.
    source = torch.rand(2 * 2**20)
    seconds = _fastest(lambda: source * 1.5, nothing, core_s)
    small = torch.rand(2**17)  # half of the size from which malloc returns memory (`workers.processes`)
    reused_s = _fastest(lambda: torch.nn.functional.silu(small), nothing, core_s)
    return MeasuredRates(
        matmul_flops_per_s=products(torch.float32),
        bf16_flops_per_s=products(torch.bfloat16) if profile_host().supports_bf16 else None,
        memory_bytes_per_s=2 * source.nbytes / seconds,
        reused_bytes_per_s=2 * small.nbytes / reused_s,
        context_bytes=0,
        host_link_bytes_per_s=None,
        link_bytes_per_s=None,
    )


def _measure_cuda(_: int) -> MeasuredRates:
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    free_before = pynvml.nvmlDeviceGetMemoryInfo(handle).free
    sync = torch.cuda.synchronize
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    best = 0.0
    for size in (2048, 4096, 8192):
        left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _fastest(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), sync)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
    # Kernels are loaded on first use; these and a softmax stand for a training step's.
    torch.softmax(left.float(), dim=-1).sum().item()
    used = free_before - pynvml.nvmlDeviceGetMemoryInfo(handle).free
    context_bytes = max(0, used - torch.cuda.memory_reserved())

    on_device = torch.empty(64 * 2**20, dtype=torch.float32, device="cuda")
    copy = torch.empty_like(on_device)
    copy_s = _fastest(lambda: copy.copy_(on_device), sync)
    pinned = torch.empty(64 * 2**20, dtype=torch.float32, pin_memory=True)
    host_s = _fastest(lambda: on_device.copy_(pinned, non_blocking=True), sync)
    link = None
    if torch.cuda.device_count() > 1:
        away = torch.empty_like(on_device, device="cuda:1")
        link = on_device.nbytes / _fastest(lambda: away.copy_(on_device, non_blocking=True), sync)
    return MeasuredRates(
        matmul_flops_per_s=best,
        memory_bytes_per_s=2 * on_device.nbytes / copy_s,
        context_bytes=context_bytes,
        host_link_bytes_per_s=pinned.nbytes / host_s,
        link_bytes_per_s=link,
    )


#: How each kind of device is measured, given its number of cores.
_MEASURES = {DeviceKind.CPU: _measure_cpu, DeviceKind.CUDA: _measure_cuda}


def _fastest(
    work: Callable[[], object], sync: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of one call of `work`: the fastest of a few runs of at least 50 ms each.

    The fastest, since other programs can only slow a run down.
    """
    work()
    sync()
    started = clock()
    work()
    sync()
    number = max(1, round(0.05 / max(clock() - started, 1e-6)))
    fastest = float("inf")
    for _ in range(_REPEATS):
        started = clock()
        for _ in range(number):
            work()
        sync()
        fastest = min(fastest, (clock() - started) / number)
    return fastest


if __name__ == "__main__":
    main(sys.argv[1:])
