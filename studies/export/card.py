"""The model card of an export for the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autosft.profiles.dataset.sources import hub_names, without_folders
from autosft.profiles.model.adapters import KINDS, describe_adapter
from autosft.profiles.recipe import Method
from autosft.profiles.units import gib
from autosft.studies.export.config import ExportedConfig
from autosft.studies.export.tools import Run, facts, one_line
from autosft.studies.formatting import format_metric, format_number


def model_card(run: Run, *, is_merged: bool, sentences: Sequence[str]) -> str:
    """Return README.md: the hub's metadata, what was trained on which data, and how good it is."""
    config = run.config
    settings = config.settings
    is_adapter = settings.adapter is not None and not is_merged
    metadata: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "autosft", *([settings.method.value] if settings.adapter is not None else [])],
    }
    if not _is_path(config.model.name):
        metadata["base_model"] = config.model.name
    if data_sets := hub_names(config.data.source):
        metadata["datasets"] = data_sets
    kind = "fine-tuned from"
    if is_adapter and settings.adapter is not None:
        name = "LoRA" if settings.adapter.kind == "lora" else settings.adapter.kind
        kind = f"{name} adapter for"
    base = Path(config.model.name).name if _is_path(config.model.name) else config.model.name
    method = {Method.FULL: "full fine-tuning", Method.LORA: "LoRA", Method.QLORA: "QLoRA"}.get(
        settings.method, settings.method.value
    )
    seen_steps = config.expected.step or run.num_steps
    rows = [
        ("method", method + (", merged into the weights" if is_merged else "")),
        ("learning rate", f"{format_number(settings.learning_rate)}, {settings.lr_scheduler}"),
        ("warm-up", f"{run.warmup_steps} of {run.num_steps} steps"),
        ("effective batch", f"{settings.effective_batch_size} examples per step"),
        ("steps", f"{seen_steps} of {run.num_steps}"),
        ("examples seen", f"{seen_steps * settings.effective_batch_size:,}"),
        ("length", f"{settings.seq_len} tokens"),
        ("optimizer", f"{settings.optimizer}, weight decay {format_number(settings.weight_decay)}"),
        ("precision", config.pinned.precision.value),
        ("seed", str(settings.seed)),
    ]
    if settings.adapter is not None:
        adapter = settings.adapter
        alpha = f", alpha {format_number(adapter.alpha)}" if KINDS[adapter.kind].alpha else ""
        rows.insert(1, ("adapter", describe_adapter(adapter) + alpha))
    if config.expected.peak_allocated_bytes:
        rows.append(("memory", f"{gib(config.expected.peak_allocated_bytes)} on {run.plan.device_name}"))
    table = "".join(f"| {name} | {one_line(str(value))} |\n" for name, value in rows)
    measured = f"{config.expected.metric} {format_metric(config.expected.value)}"
    said = "".join(f"- {one_line(sentence)}\n" for sentence in sentences or (measured,))
    data = one_line(without_folders(config.data.source))
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n"
        f"# {one_line(config.study)}\n\n"
        f"{kind[0].upper()}{kind[1:]} {base} by supervised fine-tuning on {data}: "
        f"{measured} on held-out examples.\n\n"
        f"## Results\n\n{said}\n"
        f"## Training\n\n| | |\n|---|---|\n{table}\n"
        "`best.yaml` in this folder trains it again: "
        "`autosft train best.yaml --model BASE --data DATA`.\n\n"
        "## Provenance\n\n" + "".join(f"- {_without_folders(fact, config)}\n" for fact in facts(run))
    )


def public(config: ExportedConfig) -> ExportedConfig:
    """Return a configuration without anything specific to a machine: folders, hosts, device ids."""
    environment = config.environment if isinstance(config.environment, Mapping) else {}
    options = dict(config.data.options or {})
    if options.get("eval_data"):
        options["eval_data"] = without_folders(options["eval_data"])
    pinned = config.pinned
    if pinned.loss is not None:
        pinned = replace(pinned, loss=replace(pinned.loss, folder=""))
    if pinned.trainer is not None:
        pinned = replace(pinned, trainer=replace(pinned.trainer, folder=""))
    return replace(
        config,
        model=replace(config.model, name=_shown(config.model.name)),
        data=replace(config.data, source=without_folders(config.data.source), options=options),
        pinned=pinned,
        environment={name: environment[name] for name in ("packages", "python") if name in environment},
    )


def _is_path(name: str) -> bool:
    return Path(name).expanduser().exists() or name.startswith(("/", ".", "~"))


def _shown(source: str) -> str:
    return Path(source).name if _is_path(source) else source


def _without_folders(line: str, config: ExportedConfig) -> str:
    """Remove local folders from a line: a public card should not reveal them."""
    line = line.replace(config.model.name, _shown(config.model.name))
    return line.replace(config.data.source, without_folders(config.data.source))
