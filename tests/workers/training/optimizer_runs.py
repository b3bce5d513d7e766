"""Runs each optimizer through the product's own trainer and writes down what it did, as JSON.

    python -m tests.workers.training.optimizer_runs OUTPUT.json NAME...

In a process of its own: the libraries lie in a folder beside the environment (`make test` installs them
there), since transformers imports what it finds, which takes every other process a second or two.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback

from autosft.profiles.memory.trace.optimizers import build_optimizer
from autosft.profiles.optimizers import OPTIMIZERS, find_optimizer
from autosft.profiles.recipe import Method, Precision
from autosft.studies.trial import Measurement, StopReason, TrialJob
from autosft.workers.training import train as training
from benchmarks.real_step import LiveBytes
from tests.workers.small import job, make_data, make_model, pinned, settings

#: Options as a user's trainer may hand them to transformers, each with its library's default.
DEFAULTS = {
    "stable_adamw": "kahan_sum=False,decouple_lr=False",
    "adamw_torch_8bit": "block_size=256,bf16_stochastic_round=False",
    "adamw_torch_4bit": "block_size=256,bf16_stochastic_round=False",
    "sgd": "momentum=0.0,nesterov=False",
    "adagrad": "lr_decay=0.0,eps=1e-10",
    "rmsprop": "momentum=0.0,alpha=0.99,centered=False",
    "ademamix": "beta3=0.9999,alpha=5.0",
    "schedule_free_adamw": "weight_lr_power=2.0,r=0.0",
    "schedule_free_sgd": "weight_lr_power=2.0,r=0.0",
}
RATE = 1e-3
DECAY = 0.1
#: A matrix that is decayed, and is large enough for fewer bits.
MATRIX = "model.layers.0.mlp.up_proj.weight"
#: 256 does not divide the tensors of the MLP, and k_proj and v_proj are below 4,096 values.
SIZES = {"hidden_size": 64, "intermediate_size": 130, "vocab_size": 128}

Weights = dict[str, torch.Tensor]


@dataclass
class Seen:
    """One attempt: its weights before the first step and after each, its rates, and its optimizer."""

    weights: list[Weights] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    reports: list[Measurement] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)  # of processor time
    trainer: Any = None
    keeps: bool = True  # copies of the weights

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer.optimizer

    def moved(self) -> list[float]:
        """Return how far the weights have moved in each step, root mean square."""
        return [rms(before, after) for before, after in zip(self.weights, self.weights[1:], strict=False)]


class Watch(TrainerCallback):  # type: ignore[misc]
    began = 0.0

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def keep(self) -> None:
        named = self.seen.trainer.model.named_parameters()
        self.seen.weights.append({name: one.detach().clone() for name, one in named if one.requires_grad})

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.seen.keeps:
            self.keep()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seen.rates.append(float(self.seen.trainer.lr_scheduler.get_last_lr()[0]))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seen.step_s.append(time.process_time() - self.began)
        if self.seen.keeps:
            self.keep()


def attempt(
    what: TrialJob,
    *,
    stop_after: int | None = None,
    options: str | None = None,
    keeps: bool = True,
    **fields: object,
) -> Seen:
    """Run one attempt of the product and return what was seen; `options` are transformers' `optim_args`."""
    seen = Seen(keeps=keeps)
    build, config = training.build_trainer, training.sft_config

    def watched(one: Any) -> Any:
        seen.trainer = build(one)
        seen.trainer.add_callback(Watch(seen))
        return seen.trainer

    def configured(*args: Any, **kwargs: Any) -> Any:
        made = config(*args, **kwargs)
        for name, value in {**({"optim_args": options} if options else {}), **fields}.items():
            setattr(made, name, value)
        return made

    def asked() -> StopReason | None:
        done = seen.reports[-1].step + 1 if seen.reports else 0  # a step is reported once it is over
        return StopReason.SHUTDOWN if stop_after is not None and done >= stop_after else None

    with mock.patch.multiple(training, build_trainer=watched, sft_config=configured):
        training.train(what, seen.reports.append, asked)
    return seen


def rms(before: Weights, after: Weights) -> float:
    total = sum(float((after[name].double() - one.double()).square().sum()) for name, one in before.items())
    return float((total / sum(one.numel() for one in before.values())) ** 0.5)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all that an optimizer keeps, each storage once."""
    storages: dict[int, int] = {}

    def add(value: torch.Tensor) -> None:
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                add(getattr(value, name))
            return
        storage = value.untyped_storage()
        storages[storage._cdata] = storage.nbytes()

    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                add(value)
    return sum(storages.values())


def modelled_bytes(name: str, model: torch.nn.Module) -> int:
    """Return the bytes of what the memory model keeps for the same weights; torch's own it runs itself."""
    on_meta = copy.deepcopy(model).to("meta" if OPTIMIZERS[name].package else "cpu")
    trained = [one for one in on_meta.parameters() if one.requires_grad]
    for one in trained:
        one.grad = torch.zeros_like(one)
    optimizer = build_optimizer(name, [{"params": trained}], on_meta, on_cpu=True)
    optimizer.step()
    return state_bytes(optimizer)


class PartBytes(LiveBytes):
    """Counts the tensors that a tensor is made of, not the storage that such a tensor claims to have."""

    def count(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                self.count(getattr(tensor, name))
        else:
            super().count(tensor)


def made_on_the_way(optimizer: torch.optim.Optimizer) -> int:
    """Return the most bytes that a step makes beside weights, gradients and state."""
    counter = PartBytes()
    for group in optimizer.param_groups:
        for one in group["params"]:
            one.grad = torch.ones_like(one)
            for tensor in (one, one.grad, *optimizer.state[one].values()):
                if isinstance(tensor, torch.Tensor):
                    counter.count(tensor)
    before = counter.live
    with counter:
        optimizer.step()
    return counter.peak - before


def modelled_on_the_way(name: str, model: torch.nn.Module, *, rounds_stochastically: bool = False) -> int:
    """Return the same of the memory model."""
    groups = [{"params": [one for one in model.parameters() if one.requires_grad]}]
    optimizer = build_optimizer(name, groups, model, on_cpu=True, rounds_stochastically=rounds_stochastically)
    for one in groups[0]["params"]:
        one.grad = torch.ones_like(one)
    optimizer.step()
    return made_on_the_way(optimizer)


def table_bytes(name: str, model: torch.nn.Module) -> int:
    """Return the bytes of the table's row for the same weights."""
    kept = find_optimizer(name).state
    assert kept is not None
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    sizes = [
        (kept.bytes_of(one.shape, one.itemsize, is_embedding=id(one) in embeddings))
        for one in model.parameters()
        if one.requires_grad
    ]
    return sum(sizes) + kept.shared_table_bytes


class Ground:
    """A model, one with tied weights, and data, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model", **SIZES)  # type: ignore[arg-type]
        self.tied = make_model(folder / "tied", is_tied=True, **SIZES)  # type: ignore[arg-type]
        self.data = make_data(folder / "data")
        self.count = 0

    @functools.cached_property
    def pruned(self) -> Path:
        """The model without the smaller half of each matrix of its MLPs."""
        from transformers import AutoModelForCausalLM

        folder = self.folder / "pruned"
        shutil.copytree(self.model, folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for name, one in model.named_parameters():
                if "mlp" in name:
                    one.masked_fill_(one.abs() < one.abs().median(), 0)
        model.save_pretrained(folder)
        return folder

    def job(
        self,
        *,
        is_tied: bool = False,
        is_pruned: bool = False,
        precision: Precision = Precision.FP32,
        **changes: Any,
    ) -> TrialJob:
        """Return a job of eight steps; `changes` are of its settings."""
        self.count += 1
        fields = {"learning_rate": RATE, "weight_decay": 0.0, "warmup_ratio": 0.25, "lr_scheduler": "linear"}
        return job(
            self.pruned if is_pruned else self.tied if is_tied else self.model,
            self.data,
            self.folder / str(self.count),
            settings=settings(**{**fields, **changes}),
            pinned=pinned(self.data, num_evaluations=2, precision=precision),
        )


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    with tempfile.TemporaryDirectory() as folder:
        yield Ground(Path(folder))


def facts(name: str, on: Ground) -> dict[str, Any]:
    """Run an optimizer and return what it did."""
    whole = attempt(on.job(optimizer=name))
    seen: dict[str, Any] = {
        "rates": whole.rates,
        "moved": whole.moved(),
        "state_bytes": state_bytes(whole.optimizer),
        "modelled_bytes": modelled_bytes(name, whole.trainer.model),
        "table_bytes": table_bytes(name, whole.trainer.model),
        **on_the_way(name, whole),
        "num_trained": sum(one.numel() for one in whole.trainer.model.parameters()),
    }
    stops = (3, 4) if OPTIMIZERS[name].averages else (3,)  # 4 is evaluated
    resumed = []
    for step in stops:
        what = on.job(optimizer=name)
        first = attempt(what, stop_after=step)
        if step == 3:
            seen["again"] = rms(whole.weights[3], first.weights[3])
            seen["again_bytes"] = state_bytes(first.optimizer)
        rest = attempt(replace(what, attempt=2, resume_from=first.reports[-1].checkpoint))
        resumed.append(rms(rest.weights[-1], whole.weights[-1]))
    seen["resumed"] = max(resumed)
    seen |= decayed(name, on)
    if name in DEFAULTS:
        same = attempt(on.job(optimizer=name, num_train_examples=24), options=DEFAULTS[name])
        bare = attempt(on.job(optimizer=name, num_train_examples=24))
        seen["options"] = rms(same.weights[-1], bare.weights[-1])
        seen["options_bytes"] = state_bytes(same.optimizer) - state_bytes(bare.optimizer)
    return seen


def stochastic_facts(name: str, on: Ground) -> dict[str, Any]:
    """Run an optimizer over bf16 weights that it rounds at random, and return what it did."""
    rounded = {"optimizer": name, "precision": Precision.BF16_STOCHASTIC}
    whole = attempt(on.job(**rounded))
    what = on.job(**rounded)
    first = attempt(what, stop_after=3)
    rest = attempt(replace(what, attempt=2, resume_from=first.reports[-1].checkpoint))
    sparse = attempt(on.job(**rounded, is_pruned=True, method=Method.SPARSE, weight_decay=DECAY))
    zeros = [(before == 0) for before in sparse.weights[0].values() if before.dim() >= 2]
    after = [one for one in sparse.weights[-1].values() if one.dim() >= 2]
    return {
        "dtypes": sorted({str(one.dtype) for one in whole.weights[0].values()}),
        "rates": whole.rates,
        "moved": whole.moved(),
        "resumed": rms(rest.weights[-1], whole.weights[-1]),
        "again": rms(whole.weights[3], first.weights[3]),
        "another_seed": rms(attempt(on.job(**rounded, seed=1)).weights[-1], whole.weights[-1]),
        "state_bytes": state_bytes(whole.optimizer),
        "modelled_bytes": modelled_bytes(name, whole.trainer.model),
        "table_bytes": table_bytes(name, whole.trainer.model),
        "made": made_on_the_way(whole.optimizer),
        "modelled_made": modelled_on_the_way(name, whole.trainer.model, rounds_stochastically=True),
        "num_zeros": sum(int(zero.sum()) for zero in zeros),
        "zeros_lost": sum(int((one[zero] != 0).sum()) for one, zero in zip(after, zeros, strict=True)),
        **small_steps(type(whole.optimizer)),
    }


def small_steps(made: type[torch.optim.Optimizer], num_steps: int = 40) -> dict[str, float]:
    """Return where bf16 weights of 1 are after steps of 1e-5, of which one alone is lost to rounding."""
    found = {}
    for how in (True, False):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = made([weight], lr=1e-5, weight_decay=0.0, bf16_stochastic_round=how)  # type: ignore[call-arg]
        for _ in range(num_steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found["drift" if how else "drift_to_nearest"] = float(1 - weight.detach().double().mean()) / (
            1e-5 * num_steps
        )
    return found


def on_the_way(name: str, seen: Seen) -> dict[str, int]:
    """Return what a step makes on its way, where the libraries' kernels can be looked into."""
    if OPTIMIZERS[name].package not in ("torch-optimi", "schedulefree"):
        return {}
    if OPTIMIZERS[name].averages:
        seen.optimizer.train()
    return {
        "made": made_on_the_way(seen.optimizer),
        "modelled_made": modelled_on_the_way(name, seen.trainer.model),
    }


def decayed(name: str, on: Ground) -> dict[str, Any]:
    """Return what a tied model's weights lose by decay in one step, and how many moments it has."""
    fields = {"warmup_ratio": 0.0, "lr_scheduler": "constant", "num_train_examples": 16, "optimizer": name}
    with_decay = attempt(on.job(is_tied=True, weight_decay=DECAY, **fields))
    without = attempt(on.job(is_tied=True, **fields))
    start = with_decay.weights[0][MATRIX].double()
    lost = without.weights[1][MATRIX].double() - with_decay.weights[1][MATRIX].double()
    names = list(with_decay.weights[0])
    groups = with_decay.optimizer.param_groups
    return {
        "decay": float((lost * start).sum() / (RATE * DECAY * start.square().sum())),
        "first_move": max(
            float((without.weights[1][one] - without.weights[0][one]).abs().max()) for one in names
        )
        / RATE,
        "tied_moments": sum(len(group["params"]) for group in groups) - len(names),
        "tied_states": len(with_decay.optimizer.state) - len(names),
    }


def main(output: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    with ground() as on:
        for name in names:
            try:
                seen[name] = facts(name, on)
            except Exception as error:
                seen[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            if OPTIMIZERS[name].rounds_stochastically:
                seen[f"{name}, stochastic"] = stochastic_facts(name, on)
    output.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), sys.argv[2:])
