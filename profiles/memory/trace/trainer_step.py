"""Run the step of our trainer (trl's SFTTrainer as `workers.training` uses it) on the meta device."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.memory.program.blocks import Phase
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.head_tiles import head_tiles
from autosft.profiles.memory.trace.liger import find_liger
from autosft.profiles.memory.trace.meta_adapters import adapt
from autosft.profiles.memory.trace.optimizers import build_optimizer
from autosft.profiles.memory.trace.parts import trained_here
from autosft.profiles.memory.trace.recorder import Recorder
from autosft.profiles.memory.trace.tracing import Loop, Target
from autosft.profiles.model.adapters import hold_trained_in_fp32, holds_adapter_in_fp32, peft_config
from autosft.profiles.model.model_class import build, depth_of, repeated_layers
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision, StepRecipe

#: Where the step is built; tests build the same step on the CPU and count real allocations.
DEVICE = "meta"


def target_of(recipe: StepRecipe, kind: DeviceKind, capability: tuple[int, int] | None) -> Target:
    """Return the device that a recipe is traced for."""
    autocast = recipe.precision.autocast_dtype
    return Target(
        kind=kind,
        capability=capability or (8, 0),
        autocast_dtype=None if autocast is None else getattr(torch, autocast),
    )


def trainer_loop(config: Any, recipe: StepRecipe, kind: DeviceKind, *, trust_remote_code: bool) -> Loop:
    """Build model and adapter on the meta device, and return the loop that trains and evaluates them.

    Segments: "setup", "micro" (the first micro batch of an optimizer step), "micro next" (the others, with
    accumulation), "update first" and "update" (clipping, optimizer, zeroing of gradients), "evaluate"; with a
    user's trainer also "trainer" (its construction) and "micro first" (the first micro batch of the run).
    """
    from trl.trainer.utils import add_fused_lm_head

    from autosft.profiles.memory.trace.row_attention import attention_of_training

    attention = attention_of_training(recipe.attention, padding_free=recipe.padding_free)
    dtype = getattr(torch, recipe.precision.weight_dtype)
    with torch.device(DEVICE):
        base: Any = build(
            copy.deepcopy(config),  # models write into their configuration how they were built
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
        )
    if recipe.method is Method.QLORA:
        from autosft.profiles.memory.trace.quantized import quantize_linears

        compute_dtype = torch.float16 if recipe.precision.scales_loss else torch.bfloat16
        quantize_linears(base, compute_dtype=compute_dtype)
    model = base
    if recipe.traces_shards:
        from autosft.profiles.memory.trace import fsdp

        fsdp.shard(base, recipe)
    if recipe.has_full_logits:
        find_liger()
    if recipe.adapter is not None:
        model = _adapted(base, recipe.adapter, recipe)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    current: list[Autocast] = []
    if recipe.checkpointing is not Checkpointing.OFF:
        _checkpoint(model, base, current, reentrant=recipe.checkpointing is Checkpointing.REENTRANT)
    layers = repeated_layers(base)
    run = functools.partial(_run, model=model, recipe=recipe, kind=kind, current=current)
    return Loop(model=model, layers=layers, run=run)


def _adapted(base: Any, adapter: AdapterSettings, recipe: StepRecipe) -> Any:
    model = adapt(base, adapter, peft_config(adapter, base), DEVICE)
    if holds_adapter_in_fp32(recipe.method, recipe.precision):
        hold_trained_in_fp32(model)
    else:  # trl casts the adapters of quantized models
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _checkpoint(model: Any, base: Any, current: list[Autocast], *, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    if model is not base:
        model.enable_input_require_grads()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})

    def checkpointed(function: Any, *args: Any) -> Any:
        # torch's checkpoint recomputes under the original autocast; on meta that is the emulated one.
        def again(*args: Any) -> Any:
            with current[-1]():
                return function(*args)

        inside = current[-1].active
        return checkpoint(again if inside else function, *args, use_reentrant=reentrant)

    for module in base.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpointed


def _run(
    recorder: Recorder,
    autocast: Autocast,
    shape: Shape,
    *,
    model: Any,
    recipe: StepRecipe,
    kind: DeviceKind,
    current: list[Autocast],
) -> None:
    current[:] = [autocast]
    watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if recipe.traces_shards:
        from autosft.profiles.memory.trace import fsdp

        watching = fsdp.watching(model, recorder)
    on_cpu, in_one_pass = not kind.traits.has_own_memory, recipe.precision is Precision.FP32
    with head_tiles(model, on_cpu=on_cpu, in_one_pass=in_one_pass), watching:
        build = functools.partial(
            build_optimizer,
            recipe.optimizer,
            _parameter_groups(model),
            model,
            on_cpu=not kind.traits.has_own_memory,
            rounds_stochastically=recipe.precision.rounds_stochastically,
        )
        _run_segments(recorder, autocast, shape, model=model, recipe=recipe, make_optimizer=build)


def _run_segments(
    recorder: Recorder,
    autocast: Autocast,
    shape: Shape,
    *,
    model: Any,
    recipe: StepRecipe,
    make_optimizer: Callable[[], torch.optim.Optimizer],
) -> None:
    model.train()
    with contextlib.ExitStack() as stack:
        take_step: Callable[[], None]
        if recipe.trainer is None:
            take_step = functools.partial(_micro_step, recorder, autocast, shape, model, recipe)
        else:
            # In this phase, what is derived from a parameter, such as a mask, belongs to its layer.
            with recorder.segment("trainer", Phase.OPTIMIZER):
                trainer = stack.enter_context(
                    _users_trainer(recorder, autocast, model, recipe, make_optimizer)
                )
                make_optimizer = functools.partial(_same, trainer.create_optimizer())
            take_step = functools.partial(_users_step, recorder, shape, model, trainer)
        _steps(recorder, model, recipe, make_optimizer, take_step)
    model.eval()
    with recorder.segment("evaluate", Phase.INPUT), torch.no_grad():
        _evaluation_step(recorder, autocast, shape, model)
    model.train()


def _same(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def _steps(
    recorder: Recorder,
    model: Any,
    recipe: StepRecipe,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    take_step: Callable[[], None],
) -> None:
    """Run two optimizer steps; a user's trainer may allocate what it keeps in the first."""
    micro_names = ["micro", *["micro next"] * min(2, recipe.gradient_accumulation - 1)]
    if recipe.traces_shards:
        del micro_names[2:]  # the last one reduces what all of them have added up
    if recorder.known is not None:  # updates do not depend on shapes
        _micro_steps(recorder, model, recipe, micro_names, take_step)
        recorder.drop_gradients(model)
        recorder.repeat("update first")
        recorder.repeat("update")
        return
    optimizer: torch.optim.Optimizer | None = None
    for step in range(2):
        names = list(micro_names)
        if recipe.trainer is not None and step == 0:
            names[0] = "micro first"
        _micro_steps(recorder, model, recipe, names, take_step)
        with recorder.segment("update" if step else "update first", Phase.OPTIMIZER):
            parameters = trained_here(model)
            if recipe.max_grad_norm > 0:
                norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
                del norm
            if optimizer is None:  # here, since some allocate their state at once
                optimizer = make_optimizer()
            optimizer.step()
            optimizer.zero_grad()
        recorder.mark_optimizer_state(optimizer)


def _micro_steps(
    recorder: Recorder, model: Any, recipe: StepRecipe, names: list[str], take_step: Callable[[], None]
) -> None:
    """Run the micro batches of an optimizer step, each as a segment."""
    if not recipe.traces_shards:
        for name in names:
            with recorder.segment(name, Phase.INPUT):
                take_step()
            recorder.mark_gradients(model)
        return
    from autosft.profiles.memory.trace import fsdp

    for number, name in enumerate(names, start=1):
        with recorder.segment(name, Phase.INPUT), fsdp.reducing(model, is_last=number == len(names)):
            take_step()
        recorder.mark_gradients(model, fsdp.whole_gradients(model))
        fsdp.mark_gradients(model, recorder)


def _micro_step(recorder: Recorder, autocast: Autocast, shape: Shape, model: Any, recipe: StepRecipe) -> None:
    """Run one forward and backward pass, as Trainer.training_step and SFTTrainer.compute_loss do."""
    inputs = _inputs(shape)
    num_items = torch.zeros((), dtype=torch.long, device=DEVICE)
    with _computing(recorder, autocast), _rows_attended(model, shape):
        loss = _loss_of(recipe)(model, inputs, num_items)
    _backward(recorder, recipe, loss)
    recorder.enter(Phase.INPUT)  # what dies from here on is outside the layers


@contextlib.contextmanager
def _computing(recorder: Recorder, autocast: Autocast) -> Iterator[None]:
    recorder.enter(Phase.FORWARD)
    with autocast():
        yield
        recorder.enter(Phase.HEAD)


def _backward(recorder: Recorder, recipe: StepRecipe, loss: torch.Tensor) -> None:
    recorder.enter(Phase.LOSS_BACKWARD)
    if recipe.precision.scales_loss:
        loss = loss * torch.zeros((), device=DEVICE)
    torch.autograd.backward(loss)


def _users_trainer(
    recorder: Recorder,
    autocast: Autocast,
    model: Any,
    recipe: StepRecipe,
    make_optimizer: Callable[[], torch.optim.Optimizer],
) -> contextlib.AbstractContextManager[Any]:
    """Return a context with the user's trainer, whose step is traced in place of ours."""
    from autosft.profiles.memory.trace.user_trainer_step import traced

    def backward(loss: torch.Tensor) -> None:
        _backward(recorder, recipe, loss)
        recorder.enter(Phase.OPTIMIZER)  # what is derived from a gradient from here on belongs to its layer

    return traced(
        recipe,
        model,
        computing=functools.partial(_computing, recorder, autocast),
        backward=backward,
        build_optimizer=make_optimizer,
    )


def _users_step(recorder: Recorder, shape: Shape, model: Any, trainer: Any) -> None:
    inputs = _inputs(shape)
    num_items = torch.zeros((), dtype=torch.long, device=DEVICE)
    recorder.enter(Phase.OPTIMIZER)  # until the loss is computed: see above
    trainer.training_step(model, inputs, num_items_in_batch=num_items)
    recorder.enter(Phase.INPUT)


_Loss = Callable[[Any, dict[str, Any], torch.Tensor], torch.Tensor]


def _loss_of(recipe: StepRecipe) -> _Loss:
    """Return how our trainer computes its loss: as trl does, or with a user's function."""
    from autosft.profiles.memory.trace import user_loss

    if recipe.loss is not None:
        return user_loss.of_function(recipe.loss)
    return _loss


@contextlib.contextmanager
def _rows_attended(model: Any, shape: Shape) -> Iterator[None]:
    """Check that no layer mixes the examples of a row.  Raises UserError."""
    from autosft.profiles.memory.trace.row_attention import attending

    with attending() as seen:
        yield
    num_layers = depth_of(model.config) or len(repeated_layers(model))
    if shape.is_row and len(seen) != num_layers:
        raise UserError(
            f"--padding-free: {num_layers - len(seen)} of {num_layers} kinds of layers would mix the "
            "examples of a row: they have no attention, or an implementation of their own.",
            remedy="Leave it out to train with padding.",
        )


def _loss(model: Any, inputs: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    per_token_loss = -outputs.log_probs
    loss: torch.Tensor = per_token_loss.sum() / num_items.clamp(min=1)
    # the metrics that compute_loss records
    outputs.label_mask.sum()
    outputs.entropy.detach().sum()
    outputs.is_top1.sum()
    if "attention_mask" in inputs:
        inputs["attention_mask"].sum()
    return loss


def _evaluation_step(recorder: Recorder, autocast: Autocast, shape: Shape, model: Any) -> None:
    """Run one batch of `workers.scoring.evaluation.evaluate`."""
    inputs = _inputs(shape)
    recorder.enter(Phase.EVALUATION)
    with autocast():
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        recorder.enter(Phase.EVALUATION)
    sums = (-outputs.log_probs.float()).sum(dim=1)
    counts = outputs.label_mask.sum(dim=1)
    correct = outputs.is_top1.sum(dim=1)
    del outputs, sums, counts, correct, inputs


def _inputs(shape: Shape) -> dict[str, Any]:
    if shape.is_row:
        return _row_inputs(shape)
    size = (shape.batch, shape.seq)
    made = {"input_ids": torch.zeros, "attention_mask": torch.ones, "labels": torch.zeros}
    return {name: make(size, dtype=torch.long, device=DEVICE) for name, make in made.items()}


def _row_inputs(shape: Shape) -> dict[str, Any]:
    """Return a packed row as trl's collator makes it with `padding_free`, with examples of equal length."""
    lengths = [len(part) for part in np.array_split(np.arange(shape.seq), shape.batch)]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32).to(DEVICE)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
    size = (1, shape.seq)
    return {
        "input_ids": torch.zeros(size, dtype=torch.long, device=DEVICE),
        "labels": torch.zeros(size, dtype=torch.long, device=DEVICE),
        "position_ids": positions,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.zeros(size, dtype=torch.int32, device=DEVICE),
    }


_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return Trainer's two parameter groups: with weight decay, and norms and biases without."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainable = list(zip(names, trained_here(model), strict=True))
    decayed = [parameter for name, parameter in trainable if not _NO_DECAY.search(name.lower())]
    others = [parameter for name, parameter in trainable if _NO_DECAY.search(name.lower())]
    return [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
