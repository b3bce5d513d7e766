"""Records learning curves with the product's own training step, on a model of 0.1 M parameters.

Resumes where it was interrupted: a run that is in the file is not trained again.  Recorded in blocks, each of
all tasks and seeds, so that what was interrupted is a smaller table of the same kind.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unpredicted import unpredicted_memory

from autosft.profiles.recipe import Checkpointing, Method, Precision, Sharding
from autosft.studies.search.dimensions import Choices, Dimension, Range, Value
from autosft.studies.search.space import FixedSettings, complete, default_space, settings_from
from autosft.studies.trial import ExecutionPlan, FailureKind, PinnedSettings, TrialJob

NUM_CONFIGURATIONS = 64
_BLOCK = 16
NUM_SEEDS = 2
NUM_EVALUATIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is recorded."""

    name: str
    method: Method
    num_train: int
    epochs: int
    rates: tuple[float, float]


TASKS = (
    Task(name="full", method=Method.FULL, num_train=384, epochs=1, rates=(3e-4, 5e-2)),
    Task(name="lora", method=Method.LORA, num_train=384, epochs=1, rates=(3e-4, 1e-1)),
    Task(name="full_few_examples", method=Method.FULL, num_train=64, epochs=6, rates=(3e-4, 5e-2)),
)


def record(folder: Path) -> None:
    """Train every configuration of every task that is not recorded yet, and write one file per task."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = _make_model(Path(scratch))
        firsts = [_first_job(task, model, Path(scratch) / task.name) for task in TASKS]
        for block in range(0, NUM_CONFIGURATIONS, _BLOCK):
            for task, first in zip(TASKS, firsts, strict=True):
                path = folder / f"curves_{task.name}.jsonl.gz"
                for seed in range(NUM_SEEDS):
                    _record(task, path, first, seed=seed, numbers=range(block, block + _BLOCK))


def _record(
    task: Task, path: Path, first: tuple[TrialJob, Any, dict[str, Value]], *, seed: int, numbers: range
) -> None:
    base, space, default = first
    configurations = [default, *_drawn(space, default, NUM_CONFIGURATIONS - 1)]
    header = {
        "task": task.name,
        "dimensions": {name: _written(dimension) for name, dimension in space.searched().items()},
        "default": default,
        "shares": [step / NUM_EVALUATIONS for step in range(1, NUM_EVALUATIONS + 1)],
    }
    lines = _read(path) or [header]
    done = {(line["configuration"], line["seed"]) for line in lines[1:]}
    for number in numbers:
        if (number, seed) in done:
            continue
        parameters = configurations[number]
        losses = _run(base, space, parameters, seed=seed)
        lines.append({"configuration": number, "parameters": parameters, "seed": seed, "losses": losses})
        if number % 8 == 7:
            _write(path, lines)
    _write(path, lines)


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def _write(path: Path, lines: list[Any]) -> None:
    """Write a file that is complete whenever it is read; the same lines give the same bytes."""
    part = path.with_suffix(".part")
    with gzip.GzipFile(part, "wb", mtime=0) as packed:
        packed.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    part.replace(path)


def _drawn(space: Any, default: dict[str, Value], number: int) -> list[dict[str, Value]]:
    draw = random.Random(0)
    found = []
    for _ in range(number):
        values: dict[str, Value] = {}
        for name, dimension in space.searched().items():
            if isinstance(dimension, Choices):
                values[name] = draw.choice(dimension.values)
            elif dimension.log:
                rate = math.exp(draw.uniform(math.log(dimension.low), math.log(dimension.high)))
                values[name] = dimension.nearest(float(f"{rate:.3g}"))
            else:
                values[name] = dimension.nearest(draw.uniform(dimension.low, dimension.high))
        found.append(complete(space, {**default, **values}))
    return found


def _written(dimension: Dimension) -> dict[str, Any]:
    if isinstance(dimension, Choices):
        return {"values": list(dimension.values)}
    return {key: value for key, value in asdict(dimension).items() if key in ("low", "high", "log")}


def _make_model(scratch: Path) -> Path:
    """Pre-train a small relative of the demo's model, as the demo does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from autosft.workers.tools import demo_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = demo_model._make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    model = demo_model._pretrain(model, demo_model._batches(tokenizer), lambda _: None)
    folder = scratch / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _first_job(task: Task, model: Path, folder: Path) -> tuple[TrialJob, Any, dict[str, Value]]:
    from datasets import load_from_disk

    from autosft.profiles.dataset.demo import write_demo_data
    from autosft.profiles.dataset.prepare import prepare
    from autosft.profiles.dataset.prepared import eval_fingerprint

    paths = write_demo_data(folder / "demo")
    lines = paths.train.read_text().splitlines(keepends=True)[: task.num_train]
    paths.train.write_text("".join(lines))
    data = prepare(str(paths.train), eval_data=str(paths.eval), model=str(model), cache_dir=folder / "cache")
    seq_len = max(data.train.longest, data.eval.longest)
    num_examples = data.train.num_examples * task.epochs
    space = default_space(
        method=task.method,
        num_parameters=100_000,
        num_train_examples=num_examples,
        seq_lens=[seq_len],
        effective_batch_sizes=(8, 16, 32),
        overrides={
            "learning_rate": Range(low=task.rates[0], high=task.rates[1], log=True, default=5e-3),
            "effective_batch_size": Choices(values=(8, 16, 32), default=16),
        },
    )
    default = complete(space, {})
    settings = settings_from(space, default, FixedSettings(num_train_examples=num_examples))
    job = TrialJob(
        study="recorded",
        trial=0,
        attempt=1,
        model=str(model),
        data_dir=str(data.path),
        output_dir=str(folder / "trials"),
        settings=settings,
        pinned=PinnedSettings(
            precision=Precision.FP32,
            tf32=False,
            attention="sdpa",
            eval_seq_len=seq_len,
            eval_micro_batch=40,
            eval_fingerprint=eval_fingerprint(load_from_disk(str(data.path / "eval")), seq_len),
            num_evaluations=NUM_EVALUATIONS,
        ),
        plan=_plan(settings.effective_batch_size),
        device_uuids=("CPU-0",),
        resume_from=None,
        save_resume_state=False,
        trust_remote_code=False,
    )
    return job, space, default


def _plan(effective_batch_size: int) -> ExecutionPlan:
    return ExecutionPlan(
        device_name="CPU",
        micro_batch=effective_batch_size,
        gradient_accumulation=1,
        data_parallel=1,
        checkpointing=Checkpointing.OFF,
        sharding=Sharding.NONE,
        num_threads=1,
        memory_cap_bytes=1 << 32,
        estimate=unpredicted_memory(upper_bytes=1 << 30),
        predicted_tokens_per_s=0.0,
        predicted_duration_s=0.0,
        reason="",
    )


def _run(base: TrialJob, space: Any, parameters: dict[str, Value], *, seed: int) -> list[float | None]:
    """Train one configuration in this process; return its losses, null from where it diverged."""
    from autosft.workers.training.train import train

    fixed = FixedSettings(num_train_examples=base.settings.num_train_examples, seed=seed)
    settings = settings_from(space, parameters, fixed)
    job = replace(base, settings=settings, plan=_plan(settings.effective_batch_size))
    losses: dict[int, float] = {}

    def report(measurement: Any) -> None:
        if measurement.evaluation is not None:
            losses[measurement.evaluation] = measurement.metric("eval_loss")

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # the trainer prints its losses
        end = train(job, report=report, stop_requested=lambda: None)
    shutil.rmtree(job.output_dir, ignore_errors=True)
    assert end.completed or end.failure is FailureKind.NON_FINITE_LOSS, end.message
    found = [losses.get(step, math.nan) for step in range(1, NUM_EVALUATIONS + 1)]
    return [round(loss, 5) if math.isfinite(loss) else None for loss in found]
