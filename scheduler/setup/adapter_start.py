"""An adapter's folder as `--model`: training continues from it, or it is merged into its base model first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from filelock import FileLock

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG, WEIGHT_FILES, base_of, is_adapter_folder
from autosft.profiles.model.content_mark import content_mark
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.own_folders import data_folder
from autosft.scheduler.events import Note, Observer
from autosft.studies.request import TuneRequest
from autosft.workers.tools.merge_process import merge_adapter


def with_merged_adapter(request: TuneRequest, observe: Observer) -> TuneRequest:
    """Return a request whose model is, with `--merge-adapter`, the base model with its adapter merged.

    Merging is done once, into the user's data folder; the result is identified by the adapter's content and
    its base's location.  Raises UserError for a folder without an adapter.
    """
    if not request.merge_adapter:
        return request
    if request.model is None or not is_adapter_folder(request.model):
        raise UserError(
            f"--merge-adapter: --model {request.model} is not the folder of an adapter.",
            remedy=f"Give a folder with {ADAPTER_CONFIG}, or remove --merge-adapter.",
        )
    adapter = Path(request.model).expanduser().resolve()
    base = base_of(str(adapter))
    assert base is not None
    content = [content_mark(adapter / name) for name in WEIGHT_FILES if (adapter / name).is_file()]
    digest = hashlib.sha256(json.dumps([base, *content]).encode()).hexdigest()[:12]
    folder = data_folder() / "merged" / f"{adapter.name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").is_file():
            observe(Note(message=f"Merging {request.model} into {base}, once."))
            merge_adapter(
                adapter,
                folder,
                base=base,
                keep_zeros=False,
                trust_remote_code=request.trust_remote_code,
            )
    observe(Note(message=f"--merge-adapter: training starts from {folder}."))
    return request.model_copy(update={"model": str(folder)})


def with_adapters_settings(request: TuneRequest, model: ModelProfile) -> TuneRequest:
    """Return a request with the settings of the adapter that training continues from, which are not searched.

    Raises UserError for a method that trains no adapter, and for other adapter settings.
    """
    adapter = model.adapter
    if adapter is None:
        return request
    if request.method not in ("auto", "lora", "qlora"):
        raise UserError(
            f"--method {request.method}: {request.model} is an adapter, from which training continues.",
            remedy="Use --method lora or qlora, or --merge-adapter to train the merged model.",
        )
    given = [name for name in ("lora_rank", "lora_alpha_ratio", "lora_targets") if name in request.space]
    if given or request.adapter != "lora":
        what = f"--{given[0].replace('_', '-')}" if given else f"--adapter {request.adapter}"
        raise UserError(
            f"{what}: {request.model} is an adapter of rank {adapter.rank}, alpha {adapter.alpha:g} on "
            f"{', '.join(adapter.targets)}, from which training continues.",
            remedy=f"Remove {what}, or use --merge-adapter to train another adapter on the merged model.",
        )
    kind = "dora" if adapter.use_dora else "rslora" if adapter.use_rslora else "lora"
    if adapter.use_dora and adapter.use_rslora:
        kind += ",use_rslora=true"
    if adapter.dropout:
        kind += f",lora_dropout={adapter.dropout:g}"
    space = {
        **request.space,
        "lora_rank": adapter.rank,
        "lora_alpha_ratio": adapter.alpha / adapter.rank,
        "lora_targets": ",".join(adapter.targets),
    }
    method = "lora" if request.method == "auto" else request.method
    return request.model_copy(update={"method": method, "adapter": kind, "space": space})
