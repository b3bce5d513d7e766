"""Compare ways to train all weights in less memory by the loss that they end with, against fp32.

    PYTHONPATH=.venv/optimizers python benchmarks/lean_losses.py --out benchmarks/data/lean_losses.jsonl
    python benchmarks/lean_losses.py --summary benchmarks/data/lean_losses.jsonl \\
        --write profiles/data/memory_ways.json --docs docs/training.md

A small Llama is pre-trained on the demo's notes, once per seed, and fine-tuned on three kinds of instructions
at several rates, small ones among them: what rounding loses shows only there.  The optimizers are those that
autosft's trainer makes (`workers.training.optimizers`).  `--summary` writes what `autosft plan` quotes:
profiles/data/memory_ways.json, and the table of docs/training.md.  Finished runs are skipped: it can be
interrupted.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

from autosft.profiles.dataset import demo
from autosft.profiles.recipe import Precision
from autosft.workers.training.optimizers import as_asked

#: By a word of the question: lists put into another order, words looked up, words turned into others.
TASKS = {
    "order": ("Reverse", "Say backwards", "Drop", "Skip"),
    "kinds": ("Name the kinds", "Sort into kinds"),
    "opposites": ("Give the opposites", "Turn round"),
}
RATES = (3e-5, 2e-4, 1e-3)
SEEDS = (0, 1, 2)
NUM_STEPS, BATCH_SIZE, NUM_EVAL, LENGTH = 60, 16, 128, 24
PRETRAINING_STEPS = 200


@dataclass(frozen=True)
class Way:
    precision: Precision
    optimizer: str


#: fp32 first: what the others are compared with.
WAYS = {
    "fp32": Way(Precision.FP32, "adamw_torch_fused"),
    "bf16 autocast": Way(Precision.BF16_AUTOCAST, "adamw_torch_fused"),
    "bf16 to nearest": Way(Precision.BF16, "adamw_torch_fused"),
    "bf16 compensated (Kahan)": Way(Precision.BF16, "stable_adamw"),
    "lean": Way(Precision.BF16_STOCHASTIC, "adamw_torch_8bit"),
    "leanest": Way(Precision.BF16_STOCHASTIC, "adamw_torch_4bit"),
}
BEGIN, END = "<!-- printed by benchmarks/lean_losses.py --docs -->", "<!-- end -->"
#: Those that `--memory` offers, whose loss the plan quotes.
OFFERED = ("lean", "leanest")


@dataclass(frozen=True)
class Row:
    way: str
    task: str
    seed: int
    rate: float
    untuned_loss: float
    loss: float  # of held-out answers, nats a token
    step_ms: float  # of processor time


class Words:
    """The demo's words as tokens."""

    def __init__(self) -> None:
        self.id_of = {word: number for number, word in enumerate(demo.vocabulary(), start=3)}
        self.size = len(self.id_of) + 3

    def ids(self, text: str) -> list[int]:
        return [self.id_of[word] for word in text.replace(".", " .").split()]


def batch(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Return padded questions and answers; only answers, with the token that ends them, have labels."""
    ids = torch.zeros(len(examples), LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(examples):
        both = [1, *question, *answer, 2][:LENGTH]
        ids[row, : len(both)] = torch.tensor(both)
        start = 1 + len(question)
        labels[row, start : len(both)] = ids[row, start : len(both)]
    return {"input_ids": ids, "labels": labels}


def chats(task: str, words: Words, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield questions and answers of one turn of a task."""
    for example in demo.demo_examples(seed):
        turns = [one["content"] for one in example["messages"]]
        if len(turns) == 2 and turns[0].startswith(TASKS[task]):
            yield words.ids(turns[0]), words.ids(turns[1])


def notes(words: Words, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    for opening, rest in demo.pretraining_notes(seed):
        yield [], words.ids(f"{opening} {rest}")


def take(examples: Iterator[Any], number: int) -> dict[str, torch.Tensor]:
    return batch(list(itertools.islice(examples, number)))


def pretrained(words: Words, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words.size,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=20, num_training_steps=PRETRAINING_STEPS)
    examples = notes(words, seed)
    for _ in range(PRETRAINING_STEPS):
        model(**take(examples, BATCH_SIZE)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def optimizer_of(way: Way, model: LlamaForCausalLM, rate: float, seed: int) -> torch.optim.Optimizer:
    """Return the optimizer that autosft's trainer makes."""
    options = "bf16_stochastic_round=True" if way.precision.rounds_stochastically else None
    args = TrainingArguments(
        output_dir="unused",
        optim=way.optimizer,
        optim_args=options,
        learning_rate=rate,
        seed=seed,
        use_cpu=True,
    )
    made, fields = Trainer.get_optimizer_cls_and_kwargs(args, model)
    made, fields = as_asked(args, made, fields, on_cpu=True)
    optimizer: torch.optim.Optimizer = made(model.parameters(), **fields)
    return optimizer


def tuned(base: LlamaForCausalLM, words: Words, name: str, task: str, seed: int, rate: float) -> Row:
    way = WAYS[name]
    model = copy.deepcopy(base).to(getattr(torch, way.precision.weight_dtype))
    optimizer = optimizer_of(way, model, rate, seed)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=NUM_STEPS)
    examples = chats(task, words, seed)
    held_out = take(chats(task, words, seed + 1000), NUM_EVAL)
    untuned_loss = loss_of(model, held_out)
    spent = 0.0
    for _ in range(NUM_STEPS):
        given = take(examples, BATCH_SIZE)
        began = time.process_time()
        with arithmetic_of(way):
            loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.process_time() - began
        schedule.step()
        optimizer.zero_grad()
    return Row(way=name, task=task, seed=seed, rate=rate, untuned_loss=untuned_loss,
               loss=loss_of(model, held_out), step_ms=1000 * spent / NUM_STEPS)  # fmt: skip


def arithmetic_of(way: Way) -> AbstractContextManager[Any]:
    """Return autocast where a way keeps its weights in fp32 and multiplies in bf16."""
    if way.precision is Precision.BF16_AUTOCAST:
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, held_out: dict[str, torch.Tensor]) -> float:
    """Return the loss of held-out answers, computed in fp32 from the weights as they are."""
    return float(copy.deepcopy(model).float()(**held_out).loss)


def run(out: Path, seeds: tuple[int, ...], tasks: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    words = Words()
    rows = [Row(**json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row.way, row.task, row.seed, row.rate) for row in rows}
    for seed in seeds:
        base = pretrained(words, seed)
        for task, rate, name in itertools.product(tasks, RATES, WAYS):
            if (name, task, seed, rate) not in done:
                row = tuned(base, words, name, task, seed, rate)
                with out.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


def excess(rows: list[Row]) -> dict[tuple[str, float], list[float]]:
    """Return by way and rate how far each run ends above fp32's, as a share of fp32's loss."""
    fp32 = {(row.task, row.seed, row.rate): row.loss for row in rows if row.way == "fp32"}
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        reference = fp32[row.task, row.seed, row.rate]
        found.setdefault((row.way, row.rate), []).append(row.loss / reference - 1)
    return found


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return, by way, the mean excess at each rate with half of its 95 % interval, and over all rates."""
    ways: dict[str, Any] = {}
    by_rate = excess(rows)
    for name in dict.fromkeys(row.way for row in rows):
        rates = {rate: by_rate[name, rate] for way, rate in by_rate if way == name}
        every = [one for values in rates.values() for one in values]
        ways[name] = {
            "excess": round(statistics.mean(every), 5),
            "half_width": round(1.96 * statistics.stdev(every) / math.sqrt(len(every)), 5),
            "worst_rate_excess": round(max(statistics.mean(values) for values in rates.values()), 5),
            "by_rate": {f"{rate:g}": round(statistics.mean(values), 5) for rate, values in rates.items()},
            "num_runs": len(every),
            "step_ms": round(statistics.median(row.step_ms for row in rows if row.way == name), 2),
        }  # fmt: skip
    return ways


def table(ways: dict[str, Any]) -> str:
    """Return the summary as a table of Markdown."""
    rates = list(next(iter(ways.values()))["by_rate"])
    lines = [
        f"| way | all runs | {' | '.join(f'rate {rate}' for rate in rates)} | a step (CPU) |",
        "|---|---|" + "---|" * len(rates) + "---|",
    ]
    for name, one in ways.items():
        each = " | ".join(f"{one['by_rate'][rate]:+.1%}" for rate in rates)
        mean = f"{one['excess']:+.1%} ± {one['half_width']:.1%}"
        lines.append(f"| {name} | {mean} | {each} | {one['step_ms']:.0f} ms |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="run, and append rows to this file")
    parser.add_argument("--summary", type=Path, help="rows to sum up")
    parser.add_argument("--write", type=Path, help="where to write what the plan quotes, as JSON")
    parser.add_argument("--docs", type=Path, help="the document whose table to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS))
    given = parser.parse_args()
    if given.out is not None:
        run(given.out, tuple(given.seeds), tuple(given.tasks))
    if given.summary is not None:
        rows = [Row(**json.loads(line)) for line in given.summary.read_text().splitlines()]
        ways = summary(rows)
        for name, one in ways.items():
            rates = "  ".join(f"{rate}: {value:+.2%}" for rate, value in one["by_rate"].items())
            print(
                f"{name:32} {one['excess']:+.2%} ± {one['half_width']:.2%}  {rates}  {one['step_ms']:.1f} ms"
            )
        if given.write is not None:
            given.write.write_text(json.dumps({name: ways[name] for name in OFFERED}, indent=1) + "\n")
        if given.docs is not None:
            before, rest = given.docs.read_text().split(BEGIN + "\n")
            given.docs.write_text(before + BEGIN + "\n\n" + table(ways) + "\n\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
