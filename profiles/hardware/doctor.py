"""Find what slows fine-tuning down or breaks it on a machine.  Pure: each finding comes with a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autosft.profiles.hardware.busy import USUAL_REASONS, describe_load
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.hardware.findings import Finding, Level
from autosft.profiles.hardware.machine import RAY_PORTS, Link, Machine
from autosft.profiles.units import gib

GIB = 1 << 30

#: NVIDIA's GPUs begin to slow down between 83 and 93 °C, laptops earlier than servers.
HOT_C = 83.0
#: Other processes are reported when they hold more than this share of a device.
SHARE_IN_USE = 0.05
MIN_RAM_BYTES = 4 * GIB
MIN_DISK_BYTES = 10 * GIB
#: Containers start with 64 MiB; Ray's object store and NCCL need more.
MIN_SHARED_MEMORY_BYTES = 1 * GIB
#: One direction; PCIe 3.0 x16 reaches about 12 GB/s, x8 half of that, NVLink 50 and more.
SLOW_LINK_BYTES_PER_S = 20e9


def examine(machine: Machine) -> tuple[Finding, ...]:
    """Return all findings, in the order in which a person would check."""
    gpus = gpus_of(machine)
    return (
        *driver(machine, gpus),
        *torch_build(machine, gpus),
        *(finding for gpu in gpus for finding in device(gpu)),
        *allocator(machine),
        *processor(machine),
        *memory_and_disks(machine),
        *power(machine),
        *environment(machine),
        *links(machine.links),
        *ports(machine),
        *parts(machine),
        *system(machine),
    )


def gpus_of(machine: Machine) -> tuple[DeviceProfile, ...]:
    cluster = machine.cluster
    return () if cluster is None else tuple(d for d in cluster.devices if d.traits.has_nvml)


def processor(machine: Machine) -> Iterator[Finding]:
    if words := describe_load(machine.load, machine.num_cores):
        remedy = "Close what you do not need, or wait; autosft tune says when steps are held up."
        yield Finding(topic="load", level=Level.WARNING, message=words, remedy=remedy)


def driver(machine: Machine, gpus: Sequence[DeviceProfile]) -> Iterator[Finding]:
    if machine.cluster_error is not None:
        message, remedy = machine.cluster_error
        yield Finding(topic="driver", level=Level.PROBLEM, message=message, remedy=remedy)
        return
    cluster = machine.cluster
    assert cluster is not None
    if cluster.driver_version is None:
        yield Finding(
            topic="driver",
            level=Level.NOTE,
            message="no NVIDIA driver: trials run on CPU cores",
            remedy="Install the driver if this machine has an NVIDIA GPU; in a container pass --gpus all.",
        )
        return
    yield Finding(
        topic="driver",
        level=Level.OK if gpus else Level.PROBLEM,
        message=f"NVIDIA {cluster.driver_version}, supports CUDA up to {cluster.cuda_version}"
        + ("" if gpus else ", but no GPU is usable"),
        remedy="" if gpus else "See the notes, CUDA_VISIBLE_DEVICES, and nvidia-smi.",
    )
    for note in cluster.notes:
        yield Finding(topic="driver", level=Level.WARNING, message=note)


def torch_build(machine: Machine, gpus: Sequence[DeviceProfile]) -> Iterator[Finding]:
    torch = machine.torch
    cuda = machine.cluster.cuda_version if machine.cluster else None
    if torch.version is None:
        message, remedy = f"cannot be used: {torch.error}", "Install it again: pip install torch"
    elif torch.cuda_build is None and gpus:
        message = f"{torch.version} is a CPU build, and there are {len(gpus)} GPUs"
        remedy = "pip install torch, without PyTorch's index for CPUs"
    elif torch.cuda_build and cuda and _major(torch.cuda_build) > _major(cuda):
        message = (
            f"{torch.version} is built for CUDA {torch.cuda_build}, but the driver supports only up to {cuda}"
        )
        remedy = "Update the driver, or install a build of torch for an older CUDA."
    elif gpus and not torch.sees_cuda:
        message = f"{torch.version} cannot see the GPUs: {torch.error or 'without an error message'}"
        remedy = "Look at CUDA_VISIBLE_DEVICES and nvidia-smi; a GPU in MIG mode needs a slice."
    else:
        build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU build"
        yield Finding(topic="torch", level=Level.OK, message=f"{torch.version}, {build}")
        return
    yield Finding(topic="torch", level=Level.PROBLEM, message=message, remedy=remedy)


def device(gpu: DeviceProfile) -> Iterator[Finding]:
    """Check one GPU: free memory and who holds the rest, temperature, throttling."""
    topic = f"GPU {gpu.index}"
    used = gpu.total_bytes - gpu.free_bytes
    free = f"{gpu.name}: {gib(gpu.free_bytes)} free of {gib(gpu.total_bytes)}"
    if used > SHARE_IN_USE * gpu.total_bytes:
        holders = ", ".join(
            f"{process.name} (process {process.pid}"
            f"{f', {gib(process.used_bytes)}' if process.used_bytes else ''})"
            for process in gpu.processes
        )
        yield Finding(
            topic=topic,
            level=Level.WARNING,
            message=f"{free}; held by {holders or 'processes that the driver does not name'}",
            remedy="Close browsers, games and other jobs, or let them end: trials take what is free.",
        )
    else:
        yield Finding(topic=topic, level=Level.OK, message=free)
    throttling = [reason for reason in gpu.throttle_reasons if reason not in USUAL_REASONS]
    if gpu.temperature_c is not None and (gpu.temperature_c >= HOT_C or throttling):
        yield Finding(
            topic=topic,
            level=Level.WARNING,
            message=f"{gpu.temperature_c:.0f} °C"
            + (f", throttling: {', '.join(throttling)}" if throttling else ""),
            remedy="Improve the airflow (raise a laptop, clean the fans), use the performance mode, or lower "
            "the power limit (nvidia-smi -pl WATTS) for a steady speed.",
        )
    elif throttling:
        yield Finding(
            topic=topic,
            level=Level.WARNING,
            message=f"throttling: {', '.join(throttling)}",
            remedy="Check cooling and power supply (nvidia-smi -q -d PERFORMANCE).",
        )


def allocator(machine: Machine) -> Iterator[Finding]:
    """Compare the allocator's actual settings with those that the environment asks for."""
    torch = machine.torch
    asked = machine.environment.get("PYTORCH_ALLOC_CONF") or machine.environment.get(
        "PYTORCH_CUDA_ALLOC_CONF", ""
    )
    if torch.allocator is None:
        if asked:
            yield Finding(
                topic="allocator",
                level=Level.NOTE,
                message=f"{asked} is set but has no effect: there is no CUDA allocator here",
            )
        return
    state = "expandable segments" if torch.has_expandable_segments else "fixed segments"
    message = f"{torch.allocator}, {state} (read back), settings {torch.allocator_settings or 'none'}"
    wants_expandable = "expandable_segments:true" in asked.lower().replace(" ", "")
    if wants_expandable and not torch.has_expandable_segments:
        yield Finding(
            topic="allocator",
            level=Level.WARNING,
            message=f"{message}; expandable segments were requested but are not in use",
            remedy="They need Linux and no WSL; a misspelled setting is ignored.",
        )
    elif "max_split_size_mb" in asked:
        yield Finding(
            topic="allocator",
            level=Level.NOTE,
            message=f"{message}; max_split_size_mb is a remedy against fragmentation from before expandable "
            "segments",
            remedy="Unset it: autosft sets what its memory model recommends.",
        )
    else:
        yield Finding(topic="allocator", level=Level.OK, message=message)


def memory_and_disks(machine: Machine) -> Iterator[Finding]:
    is_short = machine.ram_free_bytes < MIN_RAM_BYTES
    yield Finding(
        topic="RAM",
        level=Level.WARNING if is_short else Level.OK,
        message=f"{gib(machine.ram_free_bytes)} free of {gib(machine.ram_total_bytes)}",
        remedy="Close other programs: loading a model and running Ray take several GiB." if is_short else "",
    )
    for folder, free_bytes in machine.disks:
        is_full = free_bytes < MIN_DISK_BYTES
        yield Finding(
            topic="disk",
            level=Level.WARNING if is_full else Level.OK,
            message=f"{gib(free_bytes)} free for {folder}",
            remedy="Free some space, or choose another disk with --output: every checkpoint is a whole model."
            if is_full
            else "",
        )
    shared = machine.shared_memory_bytes
    if shared is not None:
        is_small = shared < MIN_SHARED_MEMORY_BYTES
        yield Finding(
            topic="shared memory",
            level=Level.WARNING if is_small else Level.OK,
            message=f"{gib(shared)} free in /dev/shm",
            remedy="Start the container with --shm-size 8g: Ray and NCCL use it." if is_small else "",
        )


def power(machine: Machine) -> Iterator[Finding]:
    if machine.on_battery:
        yield Finding(
            topic="power",
            level=Level.WARNING,
            message="on battery",
            remedy="Plug the machine in: laptops halve their GPU's power on battery.",
        )
    elif machine.on_battery is False:
        yield Finding(topic="power", level=Level.OK, message="plugged in")
    for what, mode in machine.power_modes:
        saves = mode in ("low-power", "quiet", "cool", "powersave", "conservative")
        # Intel's and AMD's drivers call their automatic mode "powersave": only the platform profile is
        # conclusive.
        level = Level.WARNING if saves and what == "platform profile" else Level.NOTE if saves else Level.OK
        remedy = "Choose the performance mode: powerprofilesctl set performance" if saves else ""
        yield Finding(topic="power", level=level, message=f"{what}: {mode}", remedy=remedy)


def environment(machine: Machine) -> Iterator[Finding]:
    given = machine.environment
    if given.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Finding(
            topic="environment",
            level=Level.WARNING,
            message="CUDA_LAUNCH_BLOCKING is set: every kernel launch waits for the GPU",
            remedy="unset CUDA_LAUNCH_BLOCKING (PowerShell: Remove-Item Env:CUDA_LAUNCH_BLOCKING)",
        )
    if given.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        yield Finding(
            topic="environment",
            level=Level.WARNING,
            message="PYTORCH_NO_CUDA_MEMORY_CACHING is set: every allocation goes to the driver",
            remedy="unset PYTORCH_NO_CUDA_MEMORY_CACHING",
        )
    if given.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        yield Finding(
            topic="environment",
            level=Level.WARNING,
            message="NCCL_P2P_DISABLE is set: GPUs exchange gradients through host memory",
            remedy="unset NCCL_P2P_DISABLE, unless this machine hangs without it",
        )
    if "CUDA_VISIBLE_DEVICES" in given:
        yield Finding(
            topic="environment",
            level=Level.NOTE,
            message=f"CUDA_VISIBLE_DEVICES={given['CUDA_VISIBLE_DEVICES']} hides other GPUs",
        )


def links(found: Sequence[Link]) -> Iterator[Finding]:
    """Describe the links between GPUs, one line for all pairs with equal links."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for link in found:
        words = f"{link.num_nvlinks} NVLinks" if link.num_nvlinks else "no NVLink"
        words += f", {link.path}" if link.path and not link.num_nvlinks else ""
        if link.has_peer_access is False:
            words += ", no peer access: gradients go through host memory"
        is_slow = not link.num_nvlinks or link.has_peer_access is False
        kinds.setdefault((words, is_slow), []).append(f"{link.first}-{link.second}")
    for (words, is_slow), pairs in kinds.items():
        yield Finding(
            topic="links",
            level=Level.WARNING if is_slow else Level.OK,
            message=f"GPUs {', '.join(pairs)}: {words}",
            remedy="One trial per GPU is likely faster than one trial on several; measure with "
            "autosft doctor --gpus."
            if is_slow
            else "",
        )


def ports(machine: Machine) -> Iterator[Finding]:
    for port in machine.ports_in_use:
        yield Finding(
            topic="Ray",
            level=Level.NOTE,
            message=f"port {port} ({RAY_PORTS[port]}) is in use",
            remedy="autosft uses a running cluster only with --address; `ray stop` ends a forgotten one.",
        )
    if address := machine.environment.get("RAY_ADDRESS"):
        yield Finding(topic="Ray", level=Level.NOTE, message=f"RAY_ADDRESS={address}")
    if not machine.ports_in_use:
        yield Finding(
            topic="Ray", level=Level.OK, message=f"its ports are free: {', '.join(map(str, RAY_PORTS))}"
        )


def parts(machine: Machine) -> Iterator[Finding]:
    if machine.missing_parts:
        yield Finding(
            topic="optional",
            level=Level.NOTE,
            message=f"not installed: {', '.join(machine.missing_parts)}",
            remedy=f"pip install 'autosft[{','.join(machine.missing_parts)}]'",
        )
    if machine.has_punkt is False:
        yield Finding(
            topic="optional",
            level=Level.NOTE,
            message="NLTK's punkt_tab is not installed: two kinds of IFEval instructions cannot be scored",
            remedy="python -m nltk.downloader punkt_tab",
        )


def system(machine: Machine) -> Iterator[Finding]:
    if machine.system == "Linux":
        yield Finding(topic="system", level=Level.OK, message=f"Linux, Python {machine.python}")
        return
    yield Finding(
        topic="system",
        level=Level.WARNING,
        message=f"{machine.system}, Python {machine.python}: autosft has not been tested on it. Trials "
        "are spawned instead of forked, memory is not capped on CPUs, and Windows spills to shared memory "
        "instead of failing",
        remedy="Linux and WSL2 are closest to what is tested; please report what you find.",
    )


def several_gpus(gpus: Sequence[DeviceProfile], found: Sequence[Link]) -> tuple[Finding, ...]:
    """Report what would make several GPUs slower than one.  Needs measured links and rates."""
    topic = "several GPUs"
    busy = [gpu for gpu in gpus if gpu.processes]
    throttled = [gpu for gpu in gpus if set(gpu.throttle_reasons) - USUAL_REASONS]
    rates = [gpu.link_bytes_per_s for gpu in gpus if gpu.link_bytes_per_s]
    causes = []
    if busy:
        causes.append(f"other processes run on {_names(busy)}, and each step waits for the slowest GPU")
    if throttled:
        causes.append(f"{_names(throttled)} is throttled, and each step waits for it")
    speeds = [gpu.matmul_flops_per_s for gpu in gpus if gpu.matmul_flops_per_s]
    if speeds and max(speeds) > 1.2 * min(speeds):
        slowest = min(gpus, key=lambda gpu: gpu.matmul_flops_per_s or float("inf"))
        causes.append(
            f"{_names([slowest])} computes at {min(speeds) / max(speeds):.0%} of the fastest GPU's rate, "
            "and each step waits for it"
        )
    if any(link.has_peer_access is False for link in found):
        causes.append("GPUs cannot reach each other's memory, so gradients go through host memory")
    all_reduce_rates = [gpu.all_reduce_bytes_per_s for gpu in gpus if gpu.all_reduce_bytes_per_s]
    if rates and min(rates) < SLOW_LINK_BYTES_PER_S:
        seconds = 2 * (len(gpus) - 1) / len(gpus) * 4e9 / min(all_reduce_rates or rates)
        causes.append(
            f"the slowest link moves {min(rates) / 1e9:.1f} GB/s: the fp32 gradients of 1e9 parameters take "
            f"{seconds:.2f} s a step"
        )
    if not rates:
        return (Finding(topic=topic, level=Level.NOTE, message="the links could not be measured"),)
    if not causes:
        speed = f"the slowest link moves {min(rates) / 1e9:.1f} GB/s"
        if all_reduce_rates:
            speed += f", and an all-reduce {min(all_reduce_rates) / 1e9:.1f} GB/s from each GPU"
        return (
            Finding(topic=topic, level=Level.OK, message=f"nothing found that would slow them down; {speed}"),
        )
    remedy = (
        "Run one trial per GPU (autosft tune does where that is faster), or use LoRA, whose gradients are "
    )
    return tuple(
        Finding(
            topic=topic,
            level=Level.WARNING,
            message=cause,
            remedy="" if at else remedy + "a hundred times smaller.",
        )
        for at, cause in enumerate(causes)
    )


def _names(gpus: Sequence[DeviceProfile]) -> str:
    return ", ".join(f"GPU {gpu.index}" for gpu in gpus)


def _major(version: str) -> int:
    return int(version.partition(".")[0])
