"""Time what a prediction of memory costs: the first of a model, a further setting, allocated alone.

    python benchmarks/estimate_cost.py [--json out.json] [--settings 40]

Imports are not counted.  The first answer traces the step; a further setting, (micro batch, length), is
worked out from that trace and replayed through the simulated allocator.  Goals, on two cores: 3 s, 20 ms
and 1,000 settings a second for a 7B model; twice that for 70B and for lengths of 100,000 tokens.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from autosft.profiles.devices import cluster_from_name
from autosft.profiles.memory.estimate import allocated_bytes, estimate
from autosft.profiles.memory.replay import _library
from autosft.profiles.recipe import (
    Checkpointing,
    LengthProfile,
    LoraSettings,
    Method,
    Precision,
    StepRecipe,
)

NUM_EXAMPLES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    model: str
    method: Method
    longest: int
    checkpointing: Checkpointing = Checkpointing.NON_REENTRANT
    even: bool = False  # every example is as long as the longest: no padding


CASES = (
    Case(name="7B full", model="Llama-2-7b", method=Method.FULL, longest=2048),
    Case(name="7B full, one length", model="Llama-2-7b", method=Method.FULL, longest=2048, even=True),
    Case(
        name="7B full, no checkpointing", model="Llama-2-7b", method=Method.FULL, longest=2048,
        checkpointing=Checkpointing.OFF,
    ),
    Case(name="7B lora", model="Llama-2-7b", method=Method.LORA, longest=2048),
    Case(name="70B full", model="70b", method=Method.FULL, longest=2048),
    Case(name="7B full, 100k tokens", model="Llama-2-7b", method=Method.FULL, longest=100_000),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    import torch
    import trl.trainer.sft_trainer  # noqa: F401 - what a first answer imports

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", type=int, default=40, help="further settings of each model")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"replay in {'Python: no C compiler' if _library() is None else 'C'}; wall times\n")
    print(f"{'':28} first answer   a further setting (95 %)   allocated alone")
    answers = [cost(case, arguments.settings) for case in CASES]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    return 0


def cost(case: Case, num_settings: int) -> dict[str, Any]:
    """Measure one case and print its line."""
    config, recipe, device = _config(case.model), _recipe(case), cluster_from_name("A100-80GB").devices[0]
    started = time.perf_counter()
    estimate(config, recipe, 2, _lengths(case, case.longest), device)
    first_s = time.perf_counter() - started
    settings = [
        (batch, _lengths(case, case.longest - 7 * i))
        for i, batch in zip(range(num_settings), itertools.cycle((1, 2, 3, 4)), strict=False)
    ]
    for batch, lengths in settings[:4]:  # what was not traced yet: one row, no padding
        estimate(config, recipe, batch, lengths, device)
    importlib.import_module("autosft.profiles.memory.estimate")._estimate.cache_clear()
    durations = []
    for batch, lengths in settings:
        started = time.perf_counter()
        estimate(config, recipe, batch, lengths, device)
        durations.append(time.perf_counter() - started)
    started = time.perf_counter()
    for batch, lengths in settings:
        allocated_bytes(config, recipe, batch, lengths, device)
    per_s = len(settings) / (time.perf_counter() - started)
    further_s, slow_s = statistics.median(durations), sorted(durations)[len(durations) * 95 // 100]
    print(
        f"{case.name:28} {first_s:10.2f} s   {further_s * 1e3:12.1f} ms ({slow_s * 1e3:6.1f})   "
        f"{per_s:10,.0f} settings/s",
        flush=True,
    )
    return {
        "case": case.name,
        "first_s": first_s,
        "further_s": further_s,
        "further_95th_s": slow_s,
        "allocated_settings_per_s": per_s,
    }


def _config(name: str) -> str:
    models = json.loads(files("autosft.profiles.data").joinpath("models.json").read_text("utf-8"))["models"]
    config = dict(next((one["config"] for one in models if one["name"] == name), {}))
    if name == "70b":  # Llama-2-70b (Touvron et al. 2023, table 1 and the released configuration)
        config = dict(next(one["config"] for one in models if one["name"] == "Llama-2-7b"))
        config |= {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8,
        }  # fmt: skip
        config.pop("head_dim", None)
    return json.dumps(config)


def _recipe(case: Case) -> StepRecipe:
    lora = LoraSettings(rank=16, alpha=32, targets="all-linear") if case.method is Method.LORA else None
    return StepRecipe(
        method=case.method,
        lora=lora,
        precision=Precision.BF16,
        optimizer="adamw_torch_fused",
        checkpointing=case.checkpointing,
        attention="sdpa",
    )


def _lengths(case: Case, longest: int) -> LengthProfile:
    rng = random.Random(longest)
    drawn = [longest if case.even else rng.randint(longest // 8, longest) for _ in range(NUM_EXAMPLES - 1)]
    lengths = (longest, *drawn)
    return LengthProfile(lengths=lengths, scored=tuple(n // 2 for n in lengths), max_length=longest)


if __name__ == "__main__":
    sys.exit(main())
