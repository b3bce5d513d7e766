"""`autosft profile`: this machine's devices, measured, or those of a named or saved profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands.options import (
    AsJson,
    Command,
    Hardware,
    Quiet,
    application,
    folder_of,
    teach,
    write_json,
)

if TYPE_CHECKING:
    from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile

app = application()
GIB = 1 << 30


@app.command(
    "profile",
    cls=Command,
    help=teach(
        "Measure and show the devices: free memory, capabilities, running processes.",
        "autosft profile --output my-machine.json",
    ),
    epilog="A saved profile can be used as --hardware FILE, on this and other machines.",
)
def profile(
    *,
    hardware: Hardware = "auto",
    gpus: Annotated[str | None, typer.Option(metavar="GPUS", help="Profile only these GPUs: 2,3.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the profile as JSON.")] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Measure compute, memory and link rates again, or never.",
            show_default="only rates not known yet",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure and show the devices: free memory, capabilities, running processes."""
    from autosft.profiles.hardware.benchmark import measure_cluster, unmeasured, with_measured_rates
    from autosft.profiles.hardware.discover import profile_hardware, save_profile, select
    from autosft.studies.wire import to_plain

    if output is not None:
        folder_of(output)
    cluster = profile_hardware(hardware)
    if gpus is not None:
        cluster = select(cluster, gpus)
    cluster = with_measured_rates(cluster)
    if measure or (measure is None and unmeasured(cluster)):
        from autosft.workers.processes.starters import SERVER_ENVIRONMENT

        cluster = measure_cluster(
            cluster,
            environment=SERVER_ENVIRONMENT,  # so that a CPU's memory rate is what trials get
            say=lambda line: None if quiet else typer.echo(line, err=True),
        )
    if output is not None:
        save_profile(cluster, output)
    if as_json:
        write_json(to_plain(cluster))
    elif not quiet:
        for line in describe_cluster(cluster):
            typer.echo(line)
        if output is not None:
            typer.echo(f"saved to {output}")


def describe_cluster(cluster: ClusterProfile) -> list[str]:
    """Describe the devices in lines."""
    versions = [
        f"driver {cluster.driver_version}" if cluster.driver_version else "",
        f"CUDA {cluster.cuda_version}" if cluster.cuda_version else "",
    ]
    lines = [", ".join(version for version in versions if version)]
    for device in cluster.devices:
        lines += describe_device(device)
    return [line for line in (*lines, *cluster.notes) if line]


def describe_device(device: DeviceProfile) -> list[str]:
    """Describe a device in lines: free memory, capabilities, state, processes."""
    traits = device.kind.traits
    kind = f"{traits.label} {device.index}" if traits.is_gpu else traits.label
    where = " (assumed, not found here)" if device.is_assumed else f" on {device.node}"
    abilities = [
        f"{device.num_cores} cores" if traits.is_split_by_cores else "",
        ""
        if device.compute_capability is None
        else "compute capability {}.{}".format(*device.compute_capability),
        "bf16" if device.supports_bf16 else "no bf16",
        "MIG slice" if device.is_mig else "",
    ]
    rates = [
        per_second(device.matmul_flops_per_s, "FLOP"),
        per_second(device.memory_bytes_per_s, "B"),
        "measured" if device.rates_measured else "vendor's figures",
    ]
    if rates[0] or rates[1]:
        abilities += rates
    condition = [
        f"{device.temperature_c:.0f} °C" if device.temperature_c is not None else "",
        f"power limit {device.power_limit_w:.0f} W" if device.power_limit_w is not None else "",
        f"throttled: {', '.join(device.throttle_reasons)}" if device.throttle_reasons else "",
    ]
    lines = [
        f"{kind}: {device.name}{where}",
        f"  memory   {device.free_bytes / GIB:.1f} GiB free of {device.total_bytes / GIB:.1f}",
        f"  supports {', '.join(part for part in abilities if part)}",
    ]
    links = [
        f"{per_second(rate, 'B')} to {where}"
        for rate, where in (
            (device.host_link_bytes_per_s, "the host"),
            (device.link_bytes_per_s, "another GPU of the node"),
            (device.all_reduce_bytes_per_s, "the others in an all-reduce"),
        )
        if rate is not None
    ]
    if links:
        lines.append(f"  links    {', '.join(links)}, one direction")
    if device.context_bytes:
        lines.append(f"  context  {device.context_bytes / GIB:.2f} GiB per process, before its first tensor")
    if text := ", ".join(part for part in condition if part):
        lines.append(f"  state    {text}")
    for process in device.processes:
        used = "" if process.used_bytes is None else f", {process.used_bytes / GIB:.1f} GiB"
        lines.append(f"  process  {process.pid} {process.name}{used}")
    return lines


def per_second(rate: float | None, unit: str) -> str:
    """Format a rate with a prefix: 312 TFLOP/s, 2.04 TB/s."""
    if rate is None:
        return ""
    prefix, divisor = next(
        (scale for scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if rate >= scale[1]), ("", 1.0)
    )
    return f"{rate / divisor:.3g} {prefix}{unit}/s"
