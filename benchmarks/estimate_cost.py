"""Time what a prediction of memory costs: the first of a model, a further setting, allocated alone.

    python benchmarks/estimate_cost.py [--json out.json] [--settings 40]

Imports are not counted.  The first answer traces the step; a further setting, (micro batch, length), is
worked out from that trace and replayed through the simulated allocator that trials run with (expandable
segments where the system has them).  Goals, on two idle cores: 3 s, 20 ms and 1,000 settings a second for a
7B model; half as fast for 70B and for lengths of 100,000 tokens.  Wall times are of the machine as it is; the
processor's time, of all threads, says what they would be at most where nothing else computes.
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

from autosft.profiles.hardware.known_devices import cluster_from_name
from autosft.profiles.memory.allocator.replay import _library
from autosft.profiles.memory.estimate import allocated_bytes, estimate
from autosft.profiles.recipe import (
    AdapterSettings,
    Checkpointing,
    LengthProfile,
    Method,
    Precision,
    StepRecipe,
)

NUM_EXAMPLES = 256
FIRST_GOAL_S, FURTHER_GOAL_S, ALONE_GOAL_PER_S = 3.0, 0.020, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    model: str
    method: Method
    longest: int
    checkpointing: Checkpointing = Checkpointing.NON_REENTRANT
    even: bool = False  # every example is as long as the longest: no padding
    accumulation: int = 1
    slowdown: int = 1  # that the goals allow


CASES = (
    Case(name="7B full", model="Llama-2-7b", method=Method.FULL, longest=2048),
    Case(name="7B full, one length", model="Llama-2-7b", method=Method.FULL, longest=2048, even=True),
    Case(
        name="7B full, no checkpointing", model="Llama-2-7b", method=Method.FULL, longest=2048,
        checkpointing=Checkpointing.OFF,
    ),
    Case(
        name="7B full, 16 accumulated", model="Llama-2-7b", method=Method.FULL, longest=2048, accumulation=16
    ),
    Case(name="7B lora", model="Llama-2-7b", method=Method.LORA, longest=2048),
    Case(
        name="7B lora, 16 accumulated", model="Llama-2-7b", method=Method.LORA, longest=2048, accumulation=16
    ),
    Case(name="70B full", model="70b", method=Method.FULL, longest=2048, slowdown=2),
    Case(name="7B full, 100k tokens", model="Llama-2-7b", method=Method.FULL, longest=100_000, slowdown=2),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    import torch
    import trl.trainer.sft_trainer  # noqa: F401 - what a first answer imports

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", type=int, default=40, help="further settings of each model")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"replay in {'Python: no C compiler' if _library() is None else 'C'}; wall time (processor time)\n")
    print(f"{'':26} {'first answer':>17}  {'further, median':>19}  {'95 %':>17}  allocated alone, a second")
    answers = [cost(case, arguments.settings) for case in CASES]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    return 0


def cost(case: Case, num_settings: int) -> dict[str, Any]:
    """Measure one case and print its line."""
    config, recipe, device = _config(case.model), _recipe(case), cluster_from_name("A100-80GB").devices[0]
    with Clock() as first:
        estimate(config, recipe, 2, _lengths(case, case.longest), device)
    settings = [
        (batch, _lengths(case, case.longest - 7 * i))
        for i, batch in zip(range(num_settings), itertools.cycle((1, 2, 3, 4)), strict=False)
    ]
    for batch, lengths in settings[:4]:  # what was not traced yet: one row, no padding
        estimate(config, recipe, batch, lengths, device)
    importlib.import_module("autosft.profiles.memory.estimate")._kept_estimate.cache_clear()
    further = []
    for batch, lengths in settings:
        with Clock() as clock:
            estimate(config, recipe, batch, lengths, device)
        further.append(clock)
    with Clock() as alone:
        for batch, lengths in settings:
            allocated_bytes(config, recipe, batch, lengths, device)
    walls, busy = sorted(item.wall_s for item in further), sorted(item.processor_s for item in further)
    at_95 = len(further) * 95 // 100
    answer = {
        "case": case.name,
        "first_s": first.wall_s,
        "first_processor_s": first.processor_s,
        "further_s": statistics.median(walls),
        "further_processor_s": statistics.median(busy),
        "further_95th_s": walls[at_95],
        "further_95th_processor_s": busy[at_95],
        "allocated_settings_per_s": len(settings) / alone.wall_s,
        "allocated_settings_per_processor_s": len(settings) / alone.processor_s,
    }
    reached = (
        first.processor_s <= FIRST_GOAL_S * case.slowdown,
        statistics.median(busy) <= FURTHER_GOAL_S * case.slowdown,
        len(settings) / alone.processor_s >= ALONE_GOAL_PER_S / case.slowdown,
    )
    print(
        f"{case.name:26} {first.wall_s:6.2f} s ({first.processor_s:5.2f})  "
        f"{statistics.median(walls) * 1e3:8.1f} ms ({statistics.median(busy) * 1e3:5.1f})  "
        f"{walls[at_95] * 1e3:7.1f} ({busy[at_95] * 1e3:6.1f})  "
        f"{answer['allocated_settings_per_s']:6,.0f} ({answer['allocated_settings_per_processor_s']:6,.0f})  "
        + ("goals reached" if all(reached) else "MISSED"),
        flush=True,
    )
    return answer


class Clock:
    """Measures a block of code: seconds of the wall and of the processor, all threads together."""

    wall_s = processor_s = 0.0

    def __enter__(self) -> Clock:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._started[0]
        self.processor_s = time.process_time() - self._started[1]


def _config(name: str) -> str:
    models = json.loads(files("autosft.profiles.data").joinpath("models.json").read_text("utf-8"))["models"]
    config = dict(next((model["config"] for model in models if model["name"] == name), {}))
    if name == "70b":  # Llama-2-70b (Touvron et al. 2023, table 1 and the released configuration)
        config = dict(next(model["config"] for model in models if model["name"] == "Llama-2-7b"))
        config |= {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8,
        }  # fmt: skip
        config.pop("head_dim", None)
    return json.dumps(config)


def _recipe(case: Case) -> StepRecipe:
    lora = AdapterSettings(rank=16, alpha=32, targets="all-linear") if case.method is Method.LORA else None
    return StepRecipe(
        method=case.method,
        adapter=lora,
        precision=Precision.BF16,
        optimizer="adamw_torch_fused",
        checkpointing=case.checkpointing,
        attention="sdpa",
        gradient_accumulation=case.accumulation,
    )


def _lengths(case: Case, longest: int) -> LengthProfile:
    rng = random.Random(longest)
    drawn = [longest if case.even else rng.randint(longest // 8, longest) for _ in range(NUM_EXAMPLES - 1)]
    lengths = (longest, *drawn)
    return LengthProfile(lengths=lengths, scored=tuple(n // 2 for n in lengths), max_length=longest)


if __name__ == "__main__":
    sys.exit(main())
