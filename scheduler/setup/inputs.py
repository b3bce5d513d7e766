"""Reads and checks a study's devices, model and data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.prepare import KnownDates, prepare
from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.dataset.sources import in_full as data_in_full
from autosft.profiles.dataset.sources import require_plausible as require_plausible_data
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.benchmark import with_measured_rates
from autosft.profiles.hardware.busy import busy_notes, load_now
from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.profiles.hardware.discover import named_by_uuid, profile_hardware, select
from autosft.profiles.model.files import require_plausible as require_plausible_model
from autosft.profiles.model.profile import ModelProfile, load_model_profile
from autosft.profiles.sources import full_path
from autosft.scheduler.events import Note, Observer
from autosft.studies.metrics import METRICS
from autosft.studies.request import TuneRequest
from autosft.studies.search.space import rounds_of


def devices_here(spec: str, gpus: str | None = None, num_gpus: int | None = None) -> ClusterProfile:
    """Return the devices that `--hardware`, `--gpus` and `--num-gpus` select, with rates measured earlier.

    Raises UserError for devices that are not on this machine.
    """
    hardware = devices_named(spec, gpus, num_gpus)
    if any(device.is_assumed for device in hardware.devices):
        raise UserError(
            f"--hardware {spec} is not on this machine: nothing can be trained on it.",
            remedy="Use autosft plan to see what would fit there, or --hardware auto to train here.",
        )
    return hardware


def devices_named(spec: str, gpus: str | None = None, num_gpus: int | None = None) -> ClusterProfile:
    """Return the devices that `--hardware`, `--gpus` and `--num-gpus` select, on this machine or not."""
    hardware = with_measured_rates(profile_hardware(spec))
    if gpus is not None:
        hardware = select(hardware, gpus)
    return hardware if num_gpus is None else with_most_free_memory(hardware, num_gpus)


def with_most_free_memory(hardware: ClusterProfile, num_gpus: int) -> ClusterProfile:
    """Keep the GPUs with the most free memory, the first in a tie.  Raises UserError for too many.

    A CPU that was declared as several devices counts as that many GPUs.
    """
    is_split = len(hardware.devices) > 1
    gpus = [device for device in hardware.devices if device.kind.traits.is_gpu or is_split]
    if num_gpus > len(gpus):
        raise UserError(
            f"--num-gpus {num_gpus}: there {'is' if len(gpus) == 1 else 'are'} {len(gpus) or 'no'} "
            f"GPU{'' if len(gpus) == 1 else 's'} here.",
            remedy=f"Use at most {len(gpus)}." if gpus else "Leave --num-gpus out to use the CPU.",
        )
    chosen = sorted(gpus, key=lambda gpu: (-gpu.free_bytes, gpu.node, gpu.index))[:num_gpus]
    return replace(hardware, devices=tuple(device for device in hardware.devices if device in chosen))


def found_devices(request: TuneRequest, observe: Observer) -> ClusterProfile:
    """Return the devices of this machine that the request names; report those that others keep busy.

    UUIDs name devices of every node of the cluster at --address: `open_platform` chooses among them.
    """
    if chosen_anywhere(request) is not None:
        named = len(str(request.gpus).split(","))
        if request.num_gpus not in (None, named):
            raise UserError(
                f"--gpus names {named} devices, and --num-gpus {request.num_gpus} asks for as many.",
                remedy="Give one of them.",
            )
        return devices_here(request.hardware)
    hardware = devices_here(request.hardware, request.gpus, request.num_gpus)
    for note in busy_notes(hardware.devices, load_now()):
        observe(Note(message=note))
    return hardware


def chosen_anywhere(request: TuneRequest) -> Callable[[DeviceProfile], bool] | None:
    """Return whether a device of the cluster at --address is asked for; None if all of them are."""
    if request.address is None or request.gpus is None:
        return None
    return named_by_uuid(request.gpus)


def require_plausible_inputs(request: TuneRequest) -> None:
    """Raise UserError for a model or data that cannot be one, by path and first bytes, before Ray starts."""
    if request.model is not None:
        require_plausible_model(request.model)
    for data in (request.data, request.eval_data):
        if data is not None:
            require_plausible_data(data)


def read_inputs(
    request: TuneRequest, observe: Observer, *, cache_dir: Path, known_dates: KnownDates = tuple
) -> tuple[ModelProfile, PreparedData]:
    """Read the model's configuration and the data, tokenized and split; `known_dates` as in `prepare`."""
    assert request.model is not None
    assert request.data is not None
    observe(Note(message=f"Reading {request.model} and {request.data}"))
    # transformers replaces its own module while it is being imported: a thread that waits for another
    # thread's import gets the old module, which is empty.  The next import gets the new one.
    importlib.import_module("transformers")
    model = load_model_profile(request.model, trust_remote_code=request.trust_remote_code)
    if model.note:
        observe(Note(message=model.note))
    data = prepare(
        request.data,
        model=request.model,
        cache_dir=cache_dir,
        max_positions=model.max_positions or None,
        num_embeddings=model.vocab_size,
        trust_remote_code=request.trust_remote_code,
        known_dates=known_dates,
        **data_options(request),
    )
    return model, data


def with_full_paths(request: TuneRequest) -> TuneRequest:
    """Return the request with local paths made absolute, so that they mean the same from any folder."""
    prompts = [metric.data_setting for metric in METRICS.values() if metric.benchmark is not None]
    in_full = {"model": full_path, "data": data_in_full, "eval_data": data_in_full}
    in_full |= dict.fromkeys(prompts, full_path)
    given = {name: getattr(request, name) for name in in_full}
    return request.model_copy(
        update={name: in_full[name](value) for name, value in given.items() if value is not None}
    )


def data_options(request: TuneRequest) -> dict[str, Any]:
    """Return what decides how the data is prepared, as keyword arguments of `prepare`."""
    dimension = request.dimensions().get("max_rounds")
    rounds = () if dimension is None else rounds_of(dimension)
    return {
        "eval_data": request.eval_data,
        "seed": request.seed,
        "skip_bad_records": request.skip_bad_records,
        "max_rounds": rounds[0] if len(rounds) == 1 else None,
        "train_rounds": rounds if len(rounds) > 1 else (),
        "block_size": request.block_size,
        **({} if request.fold is None else {"fold": request.fold}),
        **({} if request.template_date is None else {"template_date": request.template_date}),
    }
