"""The files of an export: configurations with their heads, training scripts, and start scripts."""

from __future__ import annotations

import pprint
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from autosft.profiles.recipe import Method
from autosft.studies.export.tools import (
    Fields,
    Run,
    differences,
    facts,
    lora_arguments,
    sft_fields,
)

#: Command that starts a training script, by `--launcher`.
LAUNCHERS = {
    "python": "python train.py",
    "torchrun": "torchrun --standalone --nproc_per_node {num_processes} train.py",
    "accelerate": "accelerate launch --num_machines 1 --num_processes {num_processes} "
    "--mixed_precision {mixed} --dynamo_backend no {cpu}train.py",
}


def as_yaml(fields: Fields, run: Run, *, remarks: Sequence[str] = ()) -> str:
    """Return fields as YAML below a head that states their origin."""
    more = [
        "data/ holds the examples of the whole run, tokenized, labelled and in their order.",
        *differences(run),
        *remarks,
    ]
    head = "".join(f"# {line}\n" for line in [*facts(run), *more])
    return head + yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes small numbers with a decimal point: YAML 1.1, which these tools read, takes 1e-05 for text."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)


def training_script(tool: str, run: Run) -> str:
    """Return a training script that needs `tool` (trl or transformers) and nothing from autosft."""
    import jinja2

    environment = jinja2.Environment(  # nosec B701 - Python, no HTML
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["pretty"] = pretty
    template = (files("autosft.studies.export") / "train.py.jinja").read_text(encoding="utf-8")
    config = run.config
    return environment.from_string(template).render(
        tool=tool,
        facts=[fact.replace("\\", "/").replace('"""', "'''") for fact in [*facts(run), *differences(run)]],
        effective_batch_size=config.settings.effective_batch_size,
        model=config.model.name,
        dtype=config.pinned.precision.weight_dtype,
        attention=config.pinned.attention,
        turn_end=list(run.turn_end),
        trust_remote_code=run.trust_remote_code,
        settings=sft_fields(run),
        lora=lora_arguments(run),
        is_lora=config.settings.adapter is not None and config.settings.adapter.kind == "lora",
        is_qlora=config.settings.method is Method.QLORA,
        scales_loss=config.pinned.precision.scales_loss,
    )


def pretty(fields: Mapping[str, Any]) -> str:
    """Return a dictionary as source code, one entry per line."""
    return (
        "{\n" + "".join(f"    {name!r}: {pprint.pformat(value)},\n" for name, value in fields.items()) + "}"
    )


# Starting


def start_command(launcher: str, run: Run) -> str:
    autocast = run.config.pinned.precision.autocast_dtype
    return LAUNCHERS[launcher].format(
        num_processes=run.plan.data_parallel,
        mixed={"bfloat16": "bf16", "float16": "fp16"}.get(autocast or "", "no"),
        cpu="--cpu " if run.on_cpu else "",
    )


def bash(command: str, run: Run) -> str:
    """Return a bash script that starts `command` in the export's folder."""
    head = "".join(f"# {line}\n" for line in facts(run)[:2])
    return f'#!/usr/bin/env bash\n{head}set -euo pipefail\ncd "$(dirname "$0")"\nexec {command} "$@"\n'


def powershell(command: str, run: Run) -> str:
    """Return a PowerShell script that starts `command` in the export's folder."""
    head = "".join(f"# {line}\n" for line in facts(run)[:2])
    lines = ('$ErrorActionPreference = "Stop"', "Set-Location $PSScriptRoot", f"{command} @args")
    return head + "".join(f"{line}\n" for line in (*lines, "exit $LASTEXITCODE"))


def write_text(folder: Path, named: Mapping[str, str]) -> list[Path]:
    """Write text files with Unix line endings; make shell scripts executable."""
    paths = []
    for name, text in named.items():
        path = folder / name
        path.write_text(text, encoding="utf-8", newline="\n")
        if path.suffix == ".sh":
            path.chmod(0o755)
        paths.append(path)
    return paths
