"""Predicted against really allocated memory, training and loading of tiny models of many families.

    python benchmarks/model_families.py --json FILE [--family NAME] [--setting NAME]
    python benchmarks/model_families.py --json FILE --table

The first form appends a line for each family and setting that FILE does not have yet; the second prints the
tables of docs/models.md.  One step is predicted as a plan predicts it (traced on torch's meta device at a few
shapes, extended to the full depth), then run on real tensors with every storage counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family
from real_step import predicted_peak_bytes, real_peak_bytes

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.program_cache import step_programs
from autosft.profiles.model.model_class import auto_class, build, config_of
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision, StepRecipe

SHAPE = Shape(batch=3, seq=131, scored=3 * 130)
LORA = AdapterSettings(rank=4, alpha=8, targets="all-linear")
SETTINGS: dict[str, dict[str, Any]] = {
    "full, fp32": {},
    "full, bf16 autocast": {"precision": Precision.BF16_AUTOCAST},
    "LoRA, fp32": {"method": Method.LORA, "adapter": LORA},
}
#: Steps of plain gradient descent on one batch, after which its loss has to be lower.
NUM_STEPS = 5
LEARNING_RATE = 1e-2


def recipe_of(family: Family, setting: str) -> StepRecipe:
    values: dict[str, Any] = {
        "method": Method.FULL,
        "adapter": None,
        "precision": Precision.FP32,
        "optimizer": "adamw_torch",
        "checkpointing": Checkpointing.OFF,
        "attention": family.attention,
        **SETTINGS[setting],
    }
    return StepRecipe(**values)


def measure(family: Family, setting: str) -> dict[str, Any]:
    """Return a row: what one step was predicted to allocate, and what it allocated."""
    recipe, started = recipe_of(family, setting), time.perf_counter()
    predicted = predicted_peak_bytes(family.config_json, recipe, SHAPE)
    took_s = time.perf_counter() - started
    real, num_trained = real_peak_bytes(family.config_json, recipe, SHAPE, block_bytes=512)
    programs = step_programs(family.config_json, recipe, DeviceKind.CPU, None, trusted=False, cache_dir=None)
    traced, depth = programs.num_layers
    return {
        "family": family.name,
        "setting": setting,
        "is_traced": predicted is not None,
        "follows_rules": programs.follows_rules,
        "layers_traced": traced,
        "layers": depth,
        "predicted_bytes": predicted,
        "real_bytes": real,
        "num_trained": num_trained,
        "seconds": round(took_s, 1),
    }


def train_and_load(family: Family) -> dict[str, Any]:
    """Train a model on one batch, save it, load it again; return whether it learned and came back."""
    torch.manual_seed(0)
    model: Any = build(config_of(family.config_json), attn_implementation=family.attention).train()
    ids = torch.randint(3, 300, (2, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=LEARNING_RATE
    )
    losses = []
    for _ in range(NUM_STEPS):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = auto_class(copy.deepcopy(model.config)).from_pretrained(
            folder, attn_implementation=family.attention
        )
        expected, got = (item.eval()(input_ids=ids, use_cache=False).logits for item in (model, again))
    return {
        "family": family.name,
        "setting": "training",
        "trains": losses[-1] < losses[0],
        "loads": bool(torch.allclose(expected, got, atol=1e-5)),
        "losses": [round(loss, 3) for loss in losses],
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/models.md."""
    by_family = {family.name: {row["setting"]: row for row in rows if row["family"] == family.name}
                 for family in FAMILIES}  # fmt: skip
    lines = [
        f"| family | models | traced | {' | '.join(SETTINGS)} | trains | loads again |",
        "|" + "---|" * (len(SETTINGS) + 5),
    ]
    for family in FAMILIES:
        own = by_family[family.name]
        full = own.get("full, fp32", {})
        how = "measured" if not full.get("is_traced") else "yes" if full["follows_rules"] else "each length"
        cells = [_error(own.get(setting)) for setting in SETTINGS]
        training = own.get("training", {})
        done = ["yes" if training.get(name) else "**no**" for name in ("trains", "loads")]
        lines.append(f"| {' | '.join([family.name, family.models, how, *cells, *done])} |")
    return "\n".join(lines)


def _error(row: dict[str, Any] | None) -> str:
    if row is None or row["predicted_bytes"] is None:
        return "-"
    predicted, real = row["predicted_bytes"], row["real_bytes"]
    return f"{predicted / 2**20:.2f} / {real / 2**20:.2f} MiB ({100 * (predicted / real - 1):+.2f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--family", action="append")
    parser.add_argument("--setting", action="append")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(read_rows(given.json)))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    there = {(row["family"], row["setting"]) for row in read_rows(given.json)}
    for family in FAMILIES:
        for setting in (*SETTINGS, "training"):
            left_out = (given.family and family.name not in given.family) or (
                given.setting and setting not in given.setting
            )
            if left_out or (family.name, setting) in there:
                continue
            row = train_and_load(family) if setting == "training" else measure(family, setting)
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
