"""Predict the speed of a trial: seconds per optimizer step, tokens per second, and the bottleneck.

A roofline model over the parts of a step (`step_work`), with rates that were measured on the machine or come
from the table of known devices, plus communication between GPUs.  Predictions without measured trials are
accurate to about 15 %; `like_measured` corrects them by measurements of the same kind of trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.recipe import Checkpointing, LengthProfile, Method, Precision, Sharding, StepRecipe
from autosft.profiles.speed.roofline import FORWARD_OP_S, Rates, rates_of
from autosft.profiles.speed.step_work import (
    BLOCK_OPS,
    MicroStep,
    accumulation_s,
    backward,
    compute_bytes,
    forward,
    head,
    lora_targets,
    num_trained,
    optimizer_s,
    resume_state_bytes,
    saved_bytes,
)

# The Trainer's synchronous overhead per micro step: fetching and collating the batch, copying it to the
# device, checking whether the loss is finite, callbacks (profiled on transformers 5.23).
TRAINER_MICRO_STEP_S = 2e-3
# Creating a trial's process and trainer, forked from a warm server; and writing the files of a checkpoint
# besides weights and state (tokenizer, configuration, random state).
START_S = 0.5
CHECKPOINT_S = 0.1
CHECKPOINT_BYTES_PER_S = 400e6  # written, then read again for its hash
# Share of a link's bandwidth that NCCL's rings reach on large messages (nccl-tests: 75 to 80 % of NVLink;
# over PCIe two directions share the host's bridge).
NVLINK_SHARE = 0.75
PCIE_SHARE = 0.5
# An all-reduce of a small tensor over a few GPUs of a node (nccl-tests: 15 to 30 us).
ALL_REDUCE_S = 25e-6
DEFAULT_LINK_BYTES_PER_S = 8e9  # PCIe of unknown generation
# Bounds over the median: from a datasheet, from measured rates, and after measured steps.
UPPER_COLD = 1.4
UPPER_MEASURED_RATES = 1.25
UPPER_CALIBRATED = 1.1
#: Share of the roofline's speed that a CPU reaches in bf16: autocast casts, and its head is not in one pass
#: (`memory.trace.one_pass_head`).  Measured with SmolLM2-135M, LoRA, 1 x 128 and 4 x 128 tokens on an AMD
#: EPYC: 1.11 and 1.10 times as fast as fp32 (`benchmarks/step_speed.py --precision bf16-autocast`), where
#: the roofline says 1.4 and 1.5.
CPU_BF16_SHARE = 0.75
#: Optimizer steps drawn to estimate the padded length of sorted ones, to about 1 %.
NUM_DRAWN_STEPS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputEstimate:
    """The predicted time of one optimizer step: every micro step, communication and the update."""

    step_s: float  # median
    upper_step_s: float
    tokens_per_s: float  # non-padding training tokens of all devices
    what_bounds: str  # the part that takes most of the step
    parts: tuple[tuple[str, float], ...]  # seconds by part, adding up to step_s
    basis: str  # "measured steps", "measured rates", "datasheet rates", "assumed rates"


def predict_step_s(
    model: ModelProfile,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    device: DeviceProfile,
    *,
    num_threads: int | None = None,
    plain_head: bool = False,
) -> ThroughputEstimate:
    """Predict the mean optimizer step on this data, in random order.

    Work is computed from padded tokens, `tokens_per_s` counts real ones.  `num_threads` is a CPU trial's
    share of the cores.  `plain_head` is for training loops with full logits; ours uses trl's chunked head,
    which scores labelled positions only.
    """
    rates = rates_of(device, num_threads=num_threads, is_fp32=recipe.precision is Precision.FP32)
    num_examples = len(lengths.lengths)
    mean_tokens = sum(lengths.lengths) / num_examples
    is_row = recipe.padding_free
    length = mean_tokens if is_row else mean_padded(lengths.lengths, recipe, micro_batch)
    step = MicroStep(
        batch=micro_batch,
        length=length,
        num_scored=micro_batch * (length if plain_head else sum(lengths.scored) / num_examples),
        is_masked=micro_batch > 1 and not is_row,
        plain_head=plain_head,
        mean_square=sum(length * length for length in lengths.lengths) / num_examples if is_row else None,
        num_calls=micro_batch if is_row and not has_row_kernel(recipe, device) else 1,
    )
    parts = _parts(model, recipe, step, device, rates)
    if device.traits.is_split_by_cores and recipe.precision is not Precision.FP32:
        parts = {name: seconds / CPU_BF16_SHARE for name, seconds in parts.items()}
    step_s = sum(parts.values())
    num_tokens = micro_batch * recipe.gradient_accumulation * recipe.data_parallel * mean_tokens
    basis, upper = _basis(device, rates)
    return ThroughputEstimate(
        step_s=step_s,
        upper_step_s=upper * step_s,
        tokens_per_s=num_tokens / step_s,
        what_bounds=max(parts, key=parts.__getitem__),
        parts=tuple(parts.items()),
        basis=basis,
    )


def predict_start_s(model: ModelProfile, recipe: StepRecipe, estimate: ThroughputEstimate) -> float:
    """Predict the seconds from the start of a trial's process to its first step, including the rehearsal.

    Includes the process and its trainer, reading and copying weights, and the rehearsal of the largest micro
    batch, counted as two average ones.
    """
    micro_step_s = estimate.step_s / recipe.gradient_accumulation
    weights_s = model.num_parameters * recipe.precision.weight_bytes / CHECKPOINT_BYTES_PER_S
    return START_S + weights_s + 2 * micro_step_s


def predict_checkpoint_s(model: ModelProfile, recipe: StepRecipe) -> float:
    """Predict the seconds of writing, hashing and installing a checkpoint with its resume state."""
    num_bytes = saved_bytes(model, recipe) + resume_state_bytes(model, recipe)
    return CHECKPOINT_S + num_bytes / CHECKPOINT_BYTES_PER_S


def predict_evaluation_s(
    model: ModelProfile,
    precision: Precision,
    micro_batch: int,
    lengths: LengthProfile,
    device: DeviceProfile,
    *,
    num_threads: int | None = None,
) -> float:
    """Predict one pass over evaluation examples: the forward pass and the loss, the longest first."""
    recipe = _inference_recipe(precision)
    rates = rates_of(device, num_threads=num_threads, is_fp32=precision is Precision.FP32)
    longest_of_batches = sorted(lengths.lengths, reverse=True)[::micro_batch]
    num_batches = len(longest_of_batches)
    length = sum(longest_of_batches) / num_batches
    step = MicroStep(
        batch=micro_batch,
        length=length,
        num_scored=micro_batch * length,
        is_masked=micro_batch > 1,
        plain_head=False,
    )
    phase = forward(model, recipe, step, rates).plus(head(model, recipe, step, rates)[0])
    return num_batches * (phase.wall_s(rates) + TRAINER_MICRO_STEP_S)


def predict_generation_s(
    model: ModelProfile,
    precision: Precision,
    device: DeviceProfile,
    *,
    batch: int,
    prompt_length: float,
    num_new_tokens: int,
    num_threads: int | None = None,
) -> float:
    """Predict generating `num_new_tokens` for a batch of prompts with a key-value cache.

    Each new token reads every weight and the cache once, and costs a chain of kernel launches, which
    dominates for small models.  Models transformers' own `generate` without compilation.
    """
    recipe = _inference_recipe(precision)
    rates = rates_of(device, num_threads=num_threads, is_fp32=precision is Precision.FP32)
    prompt = MicroStep(
        batch=batch, length=prompt_length, num_scored=batch, is_masked=batch > 1, plain_head=True
    )
    token = replace(prompt, length=1.0)
    prefill = forward(model, recipe, prompt, rates).plus(head(model, recipe, prompt, rates)[0])
    step = forward(model, recipe, token, rates).plus(head(model, recipe, token, rates)[0])
    mean_length = prompt_length + num_new_tokens / 2
    cache_bytes = (
        2 * batch * mean_length * model.num_layers * model.num_key_value_heads * model.head_dim
    ) * compute_bytes(precision)
    bookkeeping_s = 2 * BLOCK_OPS * FORWARD_OP_S  # cache updates, logits processors, stopping criteria
    one_token_s = (
        replace(
            step,
            traffic_s=step.traffic_s + cache_bytes / rates.memory_bytes_per_s,
            launch_s=1.5 * step.launch_s,  # the cache adds operators to every block
        ).wall_s(rates)
        + bookkeeping_s
    )
    return prefill.wall_s(rates) + num_new_tokens * one_token_s


def like_measured(estimate: ThroughputEstimate, ratio: float) -> ThroughputEstimate:
    """Correct an estimate by `ratio`: measured over predicted tokens per second of the same kind of runs."""
    return replace(
        estimate,
        step_s=estimate.step_s / ratio,
        upper_step_s=UPPER_CALIBRATED * estimate.step_s / ratio,
        tokens_per_s=estimate.tokens_per_s * ratio,
        parts=tuple((name, seconds / ratio) for name, seconds in estimate.parts),
        basis="measured steps",
    )


def mean_padded(lengths: Sequence[int], recipe: StepRecipe, micro_batch: int) -> float:
    """Return the mean length that the micro batches of a run are padded to.

    If the examples of a step are sorted before they are split, this is the mean over sampled steps, the same
    ones for every way to split a step.
    """
    num_micro_batches = recipe.gradient_accumulation * recipe.data_parallel
    if not recipe.sorts_steps or num_micro_batches == 1:
        return mean_longest(lengths, micro_batch)
    per_step = micro_batch * num_micro_batches
    steps = np.random.default_rng(0).choice(np.asarray(lengths), size=(NUM_DRAWN_STEPS, per_step))
    return float(-np.sort(-steps, axis=1)[:, ::micro_batch].mean())


def mean_longest(lengths: Sequence[int], batch: int) -> float:
    """Return the expected maximum length of `batch` examples drawn without replacement: the padded length.

    Exact: the i-th smallest of n is the longest of a batch with probability C(i-1, b-1) / C(n, b).
    """
    ordered = sorted(lengths)
    n, b = len(ordered), min(batch, len(ordered))
    probability = b / n  # of the largest
    expected = 0.0
    for i in range(n, b - 1, -1):
        expected += probability * ordered[i - 1]
        probability *= (i - b) / (i - 1) if i > 1 else 0.0
    return expected


def has_row_kernel(recipe: StepRecipe, device: DeviceProfile) -> bool:
    """Return whether a packed row is attended to in one call (see `memory.trace.row_attention`)."""
    has_flash = device.traits.has_flash_attention(device.compute_capability)
    return has_flash and recipe.precision is not Precision.FP32


def _parts(
    model: ModelProfile, recipe: StepRecipe, step: MicroStep, device: DeviceProfile, rates: Rates
) -> dict[str, float]:
    """Return the seconds of an optimizer step by part."""
    head_forward, head_backward = head(model, recipe, step, rates)
    ahead = forward(model, recipe, step, rates)
    back = backward(model, recipe, step, rates)
    if recipe.checkpointing is not Checkpointing.OFF:
        back = back.plus(ahead)
    whole = ahead.plus(head_forward).plus(back).plus(head_backward)
    accumulation = recipe.gradient_accumulation
    sent = _communication_s(model, recipe, device, forward_s=ahead.device_s, backward_s=back.device_s)
    copied = _copies_s(model, recipe, rates)
    is_sharded = recipe.sharding is Sharding.FSDP and recipe.adapter is None  # adapters are replicated
    shards = recipe.data_parallel if is_sharded else 1
    return {
        "matrix products": accumulation * whole.matmul_s,
        "attention": accumulation * whole.attention_s,
        "memory traffic of activations and weights": accumulation * whole.traffic_s,
        "output head and loss": accumulation * whole.head_s,
        "launching kernels": accumulation * (whole.wall_s(rates) - whole.device_s + TRAINER_MICRO_STEP_S),
        "gradient accumulation": (accumulation - 1) * accumulation_s(model, recipe, rates),
        "optimizer": optimizer_s(model, recipe, rates) / shards,
        "communication between GPUs": sent + copied,
    }


def _communication_s(
    model: ModelProfile, recipe: StepRecipe, device: DeviceProfile, *, forward_s: float, backward_s: float
) -> float:
    """Return the seconds of communication per optimizer step that computation does not hide.

    DDP: one all-reduce of the gradients (ring: 2 (n-1)/n of their bytes), overlapped with the last
    backward pass.  FSDP: every micro step gathers the weights, in the dtype in which they are kept, for the
    forward and for the backward pass, (n-1)/n of their bytes each, overlapped with the pass that needs them;
    the last one also reduces the gradients, in fp32.  Adapters are replicated: one all-reduce for each
    tensor, after the backward pass.
    """
    n = recipe.data_parallel
    if n == 1 or recipe.sharding is Sharding.NONE:
        return 0.0
    link = device.link_bytes_per_s or device.host_link_bytes_per_s or DEFAULT_LINK_BYTES_PER_S
    has_nvlink = device.link_bytes_per_s is not None and link > (device.host_link_bytes_per_s or 0.0)
    rate = device.all_reduce_bytes_per_s or link * (NVLINK_SHARE if has_nvlink else PCIE_SHARE)
    share = (n - 1) / n
    reduce_s = 2 * share * num_trained(model, recipe) * _gradient_bytes(recipe) / rate
    if recipe.sharding is Sharding.DDP:
        return max(0.1 * backward_s, reduce_s - 0.9 * backward_s)
    gather_s = share * model.num_parameters * recipe.precision.weight_bytes / rate
    scatter_s = share * num_trained(model, recipe) * 4 / rate if recipe.adapter is None else 0.0
    after_s = 0.0
    if recipe.adapter is not None:
        num_tensors = 2 * sum(group.count for group in lora_targets(model, recipe.adapter))
        after_s = reduce_s + num_tensors * ALL_REDUCE_S
    exposed_s = max(0.0, gather_s - forward_s) + max(0.0, gather_s - backward_s)
    last_s = max(0.0, gather_s + scatter_s - backward_s) - max(0.0, gather_s - backward_s)
    first_gather_s = gather_s / max(1, model.num_layers)
    return recipe.gradient_accumulation * (exposed_s + first_gather_s) + last_s + after_s


def _copies_s(model: ModelProfile, recipe: StepRecipe, rates: Rates) -> float:
    """Return the seconds per optimizer step that ranks spend on copies around collectives.

    FSDP2 copies gathered weights out of their buffer twice a micro step, and whole gradients, cast to fp32,
    into another one (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py); DDP copies gradients into its
    buckets and back.  All of them on the stream that computes.
    """
    if recipe.data_parallel == 1 or recipe.sharding is Sharding.NONE:
        return 0.0
    trained = num_trained(model, recipe)
    if recipe.sharding is Sharding.DDP:
        return 4 * trained * _gradient_bytes(recipe) / rates.memory_bytes_per_s
    gathered = 2 * 2 * model.num_parameters * recipe.precision.weight_bytes * recipe.gradient_accumulation
    reduced = trained * (_gradient_bytes(recipe) + 4) if recipe.adapter is None else 0
    return (gathered + reduced) / rates.memory_bytes_per_s


def _gradient_bytes(recipe: StepRecipe) -> int:
    """Return the bytes of one number of a gradient; peft keeps adapters in fp32 on 16-bit weights."""
    return 4 if recipe.adapter is not None else recipe.precision.weight_bytes


def _basis(device: DeviceProfile, rates: Rates) -> tuple[str, float]:
    if rates.is_assumed:
        return "assumed rates", 2 * UPPER_COLD
    if device.rates_measured:
        return "measured rates", UPPER_MEASURED_RATES
    return "datasheet rates", UPPER_COLD


def _inference_recipe(precision: Precision) -> StepRecipe:
    return StepRecipe(
        method=Method.FULL,
        adapter=None,
        precision=precision,
        optimizer="adamw_torch_fused",
        checkpointing=Checkpointing.OFF,
        attention="sdpa",
    )
