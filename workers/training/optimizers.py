"""Makes a trial's optimizer do what is asked of it, where its library or transformers would not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Options of torch-optimi's StableAdamW that transformers 5.23 takes for true whatever the text says.
_BOOLEANS = ("kahan_sum", "decouple_lr")
#: Seeds of a run's steps: the run's above so many bits of the step's number.
_STEP_BITS = 32
_FALSE = ("false", "0", "no", "off", "")


def as_asked(
    args: TrainingArguments, optimizer_class: Any, fields: dict[str, Any], *, on_cpu: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the class and the fields that transformers has chosen for `args.optim`, mended.

    - Options are read as what they say: "False" as false, numbers as numbers.
    - A schedule-free optimizer has no warm-up of its own: the schedule's is the one that was asked for, and
      transformers passes it on a second time, as a share even where a number of steps is needed.
    - On the CPU torchao's step is not compiled, which takes one to two minutes.
    - How it rounds bf16 weights at random depends on seed and step alone: a resumed run and other devices
      round the same way, and whatever else draws random numbers draws the same ones.
    """
    name = str(getattr(args.optim, "value", args.optim))
    row = OPTIMIZERS.get(name)
    options = _options(args.optim_args)
    if name == "stable_adamw":
        fields |= {key: _truth(options[key]) for key in _BOOLEANS if key in options}
    if row is None:
        return optimizer_class, fields
    if row.package == "torchao":
        fields |= {"block_size": int(fields.get("block_size", 256))}
        if on_cpu:
            optimizer_class = _not_compiled(optimizer_class)
        fields["bf16_stochastic_round"] = _truth(options.get("bf16_stochastic_round", "False"))
        if fields["bf16_stochastic_round"]:
            optimizer_class = _rounding_by(optimizer_class, args.seed)
    if row.averages:
        fields |= {"warmup_steps": 0}
    return optimizer_class, fields


def forget_other_trials() -> None:
    """Drop what bitsandbytes keeps of the optimizers made before in this process.

    Its one manager holds every model's embeddings, and gives a later optimizer's parameter at the same
    position the moments that were meant for them.
    """
    library = sys.modules.get("bitsandbytes")
    if library is not None and hasattr(library, "optim"):
        library.optim.GlobalOptimManager.get_instance().initialize()


def averages(optimizer: Any) -> bool:
    """Whether an optimizer trains other weights than the ones to evaluate and to keep."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return any("train_mode" in group for group in inner.param_groups)


def _options(text: str | None) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in (text or "").replace(" ", "").split(",") if pair)
    return {key: value for key, _, value in pairs}


def _truth(text: str) -> bool | None:
    return None if text.lower() == "none" else text.lower() not in _FALSE


def _not_compiled(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return optimizer_class.step(self, closure)

    return type(optimizer_class.__name__, (optimizer_class,), {"step": step})


def _rounding_by(optimizer_class: type[torch.optim.Optimizer], seed: int) -> type[torch.optim.Optimizer]:
    """Return the class with a step whose random numbers depend on the seed and the number of steps alone."""

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        trained = [one for group in self.param_groups for one in group["params"]]
        counted = next((state["step"] for one in trained if (state := self.state.get(one))), 0)
        devices = [one.device.index for one in trained[:1] if one.is_cuda]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((seed << _STEP_BITS) + int(counted))
            return optimizer_class.step(self, closure)

    return type(optimizer_class.__name__, (optimizer_class,), {"step": step})
