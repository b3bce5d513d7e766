"""What each optimizer does in our trainer, as docs/optimizers.md; and what the check of the first step takes.

    PYTHONPATH=.venv/optimizers python benchmarks/optimizers.py --docs docs/optimizers.md
    python benchmarks/optimizers.py --cost [--json]

The first runs every optimizer that runs on a CPU, a dozen short trials each, and writes the page; `make test`
installs their libraries into .venv/optimizers.  The second compares the check's processor time with that of
a
step of SmolLM2-135M's shape on one example of at most 12 tokens: longer ones take longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from autosft.profiles.optimizers import OPTIMIZERS, Decay, bytes_in_words, needs
from autosft.workers.training import applied_step

PAGE = """# Optimizers

Written by `benchmarks/optimizers.py --docs docs/optimizers.md` from the table in `profiles/optimizers.py`
and from what each optimizer did in autosft's own trainer ({versions}, CPU).
`tests/workers/training/test_optim_names.py` holds every row to it: a rate of 0 moves nothing, the schedule
shows in how far weights move, weight decay has the size asked for, options written out as their defaults
change nothing, a run that is interrupted and gone on with equals the one that was not, a second trial in
the process equals the first, tied weights are one parameter, and the state's bytes are what the memory
model says. `autosft plan --optimizer help` lists the same.

    autosft tune --model ./llama --data chats.jsonl --optimizer adafactor
    autosft plan --model Llama-2-7b --hardware A100-80 --optimizer adamw_8bit

`adamw_torch_fused` is the default; a study that was begun with `adamw_torch`, the default of earlier
versions, keeps it. An optimizer is chosen by its transformers name; several are searched
(`--optimizer "adamw_torch_fused, adafactor"`). What is not in the table is refused before a trial starts, and
so is an optimizer that would not do what is asked: with weight decay where it does not apply it, in bf16
weights where they would be rounded, without its package, or without a GPU where it needs one.

## What can be asked for

- **Bytes**: of state a trained parameter of a large fp32 matrix, and of a bf16 one where it differs.
  *Small* are the bytes measured on a model of {num_trained:,} parameters, where embeddings and tensors
  below 4,096 values keep more.
- **Schedule**: how much further the most mobile step of a run moved weights than the least, for its rate
  (1: exactly in proportion; 6 would be a rate that stays as it is).
- **Decay**: what one step took off the weights, over rate x decay x weight.
- **Resume**: by how much a run interrupted at a step and gone on with differs at its end (root mean
  square).
- **First step**: how far it moves a weight at most, over the rate; the bound that is checked in every
  trial.

| optimizer | bytes | small | needs | schedule | decay | resume | first step | |
|---|---|---|---|---|---|---|---|---|
{rows}

A check of the first step runs in every trial ([training.md](training.md#the-first-step)): whatever
library is installed, a trial ends with the cause where weights are not in the optimizer once, move in the
backward pass, move at a rate of 0, or move further than the rate allows.

## Refused

| optimizer | why | use |
|---|---|---|
{refused}

## Mended

- `schedule_free_adamw`, `schedule_free_sgd`: transformers warms up twice (the schedule, and the
  optimizer's own count, which it is given as a share), and the weights that are saved are not the
  averaged ones. Here the schedule asked for applies, and evaluations and checkpoints have the averaged
  weights.
- `stable_adamw`: transformers takes the option texts "False" and "0" for true.
- `adamw_torch_8bit`, `adamw_torch_4bit`: a `block_size` given as text fails; on the CPU the step is not
  compiled, which takes one to two minutes.
- bitsandbytes: its one manager keeps every trial's embeddings, and gives the next trial's weights at the
  same place their 32-bit moments. It is emptied before each trial and after it.
- Tied weights that were loaded with `load_state_dict(assign=True)` are two parameters over one memory:
  they are tied again.
"""


def row_of(name: str, seen: dict[str, Any] | None) -> str:
    row = OPTIMIZERS[name]
    cells = [f"`{name}`", bytes_in_words(row), "-", needs(row), "untried: needs a GPU", "-", "-", "-"]
    if seen is not None:
        per_rate = [step / rate for step, rate in zip(seen["moved"], seen["rates"], strict=True) if rate]
        decay = "not in that size" if row.decay is Decay.IN_GRADIENT else f"{seen['decay']:.3f}"
        first = f"{seen['first_move']:.3g}" + (
            "" if row.first_move is None else f" (at most {row.first_move:g})"
        )
        small = f"{seen['state_bytes'] / seen['num_trained']:.2f}"
        spread = f"{max(per_rate) / min(per_rate):.2f}"
        cells[2:3], cells[4:] = [small], [spread, decay, f"{seen['resumed']:g}", first]
    return f"| {' | '.join(cells)} | {row.remark} |"


def page() -> str:
    from importlib.metadata import version

    from tests.workers.training.optimizer_runs import facts, ground

    rows, seen = [], {}
    with ground() as on:
        for row in OPTIMIZERS.values():
            if row.is_proven:
                seen[row.name] = None if row.pages else facts(row.name, on)
                rows.append(row_of(row.name, seen[row.name]))
                print(rows[-1], file=sys.stderr)
    packages = ("torch", "transformers", "bitsandbytes", "torchao", "schedulefree", "torch-optimi")
    refused = [
        f"| `{row.name}` | {row.refused} | `{row.nearest}` |" for row in OPTIMIZERS.values() if row.refused
    ]
    return PAGE.format(
        versions=", ".join(f"{name} {version(name)}" for name in packages),
        num_trained=next(one["num_trained"] for one in seen.values() if one is not None),
        rows="\n".join(rows),
        refused="\n".join(refused),
    )


def cost() -> dict[str, float]:
    """Return processor seconds of a step, the median of 5, and of the check, at SmolLM2-135M's shape."""
    from tests.workers.small import job, make_data, make_model, plan, settings
    from tests.workers.training.optimizer_runs import attempt

    took: list[float] = []

    def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = function(*args, **kwargs)
            into.append(time.process_time() - started)
            return result

        return run

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(
            applied_step.AppliedStep,
            __init__=timed(applied_step.AppliedStep.__init__, took),
            before_step=timed(applied_step.AppliedStep.before_step, took),
            after_step=timed(applied_step.AppliedStep.after_step, took),
        ),
    ):
        where = Path(folder)
        shape = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30}
        model = make_model(where / "model", **shape, num_heads=9, num_kv_heads=3)
        data = make_data(where / "data")
        what = job(model, data, where / "run", plan=plan(micro_batch=1, effective_batch_size=1))
        what = replace(
            what,
            save_resume_state=False,
            settings=settings(effective_batch_size=1, num_train_examples=6, warmup_ratio=0.0),
            pinned=replace(what.pinned, num_evaluations=1),
        )
        seen = attempt(what, keeps=False)
    step = statistics.median(seen.step_s[1:])
    return {"step_s": step, "check_s": sum(took), "share": sum(took) / step}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.docs:
        given.docs.write_text(page())
    if given.cost:
        found = cost()
        print(
            json.dumps(found)
            if given.json
            else f"step {found['step_s']:.2f} s, check {found['check_s'] * 1e3:.1f} ms: "
            f"{found['share']:.2%} of a step"
        )
