"""Run a user's trainer on the meta device: its own methods, with stand-ins for trl's.

The class's own `__init__`, `create_optimizer`, `training_step` and `compute_loss` run unchanged; where they
call trl's, the traced step runs instead.  Not covered: what depends on values of tensors or of training
arguments (`args` has trl's defaults, except for what the recipe sets), and what callbacks allocate.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from autosft.profiles.memory.trace import user_loss
from autosft.profiles.memory.trace.host_memory import bounded
from autosft.profiles.recipe import Checkpointing, Precision, StepRecipe
from autosft.profiles.user_code import load

Backward = Callable[[torch.Tensor], None]


@contextlib.contextmanager
def traced(
    recipe: StepRecipe,
    model: Any,
    *,
    computing: Callable[[], contextlib.AbstractContextManager[None]],
    backward: Backward,
    build_optimizer: Callable[[], torch.optim.Optimizer],
) -> Iterator[Any]:
    """Yield an instance of the recipe's trainer; within the block, trl's methods are patched.

    `computing` is the context of the forward pass, `backward` replaces the accelerator's, and
    `build_optimizer` trl's create_optimizer.
    """
    from trl import SFTTrainer

    assert recipe.trainer is not None
    trainer = load(recipe.trainer, flag="--trainer")
    instead = _instead_of_trl(recipe, computing=computing, backward=backward, build_optimizer=build_optimizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hooks_put_back(model))
        for name, function in instead.items():
            stack.enter_context(mock.patch.object(SFTTrainer, name, function))
        made = trainer(
            model=model, args=_arguments(recipe), train_dataset=None, processing_class=None,
            data_collator=None, peft_config=None,
        )  # fmt: skip
        if recipe.loss is not None:  # takes precedence over the trainer's own, as in `workers.training`
            function = user_loss.of_function(recipe.loss)
            made.compute_loss = lambda model, inputs, num_items_in_batch=None, **_: function(
                model, inputs, num_items_in_batch
            )
        yield made


def _instead_of_trl(
    recipe: StepRecipe,
    *,
    computing: Callable[[], contextlib.AbstractContextManager[None]],
    backward: Backward,
    build_optimizer: Callable[[], torch.optim.Optimizer],
) -> dict[str, Callable[..., Any]]:
    """Return the methods, by name, that replace those of SFTTrainer; arguments as in `traced`."""
    from trl import SFTTrainer

    take_loss = SFTTrainer.compute_loss

    def begin(self: Any, model: Any, **_: Any) -> None:
        self.__dict__.update(_parts_of_a_run(model, recipe, backward))

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.Tensor, "item", return_value=1):  # metrics have no values
            return take_loss(self, *args, **kwargs)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager(), bounded():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        detached: torch.Tensor = loss.detach()
        return detached

    def create_optimizer(self: Any, *_: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer()
        made: torch.optim.Optimizer = self.optimizer
        return made

    return {
        "__init__": begin,
        "compute_loss": compute_loss,
        "compute_loss_context_manager": lambda _: computing(),
        "create_optimizer": create_optimizer,
        "training_step": training_step,
        "_prepare_inputs": lambda _, inputs: dict(inputs),
    }


@contextlib.contextmanager
def _hooks_put_back(model: torch.nn.Module) -> Iterator[None]:
    """Remove the hooks that a trainer adds to the model, which is traced again at other shapes."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(module, name, getattr(module, name).copy()) for module in model.modules() for name in names]
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
        for parameter in model.parameters():
            parameter._backward_hooks = None
            parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as of a tensor without hooks


def _parts_of_a_run(model: Any, recipe: StepRecipe, backward: Backward) -> dict[str, Any]:
    """Return the attributes of SFTTrainer that its methods and those of most users read."""
    return {
        "model": model,
        "model_wrapped": model,
        "args": _arguments(recipe),
        "accelerator": SimpleNamespace(
            num_processes=1,
            parallelism_config=None,
            sync_gradients=True,
            is_main_process=True,
            device=torch.device("meta"),
            gather_for_metrics=lambda tensor: tensor,
            gather=lambda tensor: tensor,
            unwrap_model=lambda model, **_: model,
            backward=lambda loss, **_: backward(loss),
        ),
        "state": SimpleNamespace(global_step=0, epoch=0.0, max_steps=1000, log_history=[]),
        "callback_handler": SimpleNamespace(add_callback=lambda _: None, callbacks=[]),
        "optimizer": None,
        "optimizer_cls_and_kwargs": None,
        "lr_scheduler": None,
        "current_gradient_accumulation_steps": recipe.gradient_accumulation,
        "aux_loss_enabled": False,
        "compute_loss_func": None,
        "label_smoother": None,
        "get_tp_size": lambda: 1,
        "_tp_size": 1,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }


def _arguments(recipe: StepRecipe) -> SimpleNamespace:
    """Return trl's arguments without creating an SFTConfig, which would initialise devices."""
    from trl import SFTConfig

    values: dict[str, Any] = {}
    for field in dataclasses.fields(SFTConfig):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return SimpleNamespace(
        **{
            **values,
            "average_tokens_across_devices": True,
            "loss_type": "nll",
            "max_length": None,
            "optim": recipe.optimizer,
            "gradient_accumulation_steps": recipe.gradient_accumulation,
            "max_grad_norm": recipe.max_grad_norm,
            "activation_checkpointing": recipe.checkpointing is not Checkpointing.OFF,
            "bf16": recipe.precision is Precision.BF16_AUTOCAST,
            "fp16": recipe.precision.scales_loss,
        },
        n_gpu=1,
        world_size=1,
        process_index=0,
        device=torch.device("meta"),
    )
