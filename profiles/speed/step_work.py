"""Predict the time of one micro step of training from its operations and memory traffic, part by part.

Counts of operations and bytes come from the code that runs: transformers' Llama-like blocks, peft's LoRA
layer, trl's chunked head, torch's optimizers.  The limits: blocks are taken to be Llama-like (RMSNorm,
rotary positions, a gated MLP), which over-counts GPT-2's by a few per cent of a step, and dropout is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autosft.profiles.memory import trainable
from autosft.profiles.memory.program.program import ONE_PASS_VOCABULARY
from autosft.profiles.model.profile import LinearGroup, ModelProfile
from autosft.profiles.recipe import AdapterSettings, Method, Precision, StepRecipe
from autosft.profiles.speed.roofline import (
    ATTENTION_BACKWARD_SHARE,
    ATTENTION_FORWARD_SHARE,
    ATTENTION_HALF_LENGTH,
    BACKWARD_OP_S,
    CPU_OP_RATIO,
    FORWARD_OP_S,
    Rates,
    matmul_s,
    operators_s,
)

FP32_BYTES = 4
# Comparisons, masks and exponentials of trl's head on a CPU: a logit takes 8 to 15 ns forward and 15 to 25 ns
# backward on one core of an AMD EPYC, for vocabularies of 600 to 49,152.
# Fitted, like CPU_OP_RATIO, to the twelve trials of benchmarks/run_time_accuracy.py.
HEAD_OPERATOR_SHARE = 0.45
# Operators of a block's forward in transformers' Llama: two norms of 7, seven linear layers, 14 of the
# rotary positions, 10 views and transposes, attention, the gate's two and two sums.
BLOCK_OPS = 50
# Each further call of attention: slices of queries, keys and values, two transposes, the attention itself.
ATTENTION_CALL_OPS = 6
# peft's LoRA layer beyond its base layer: cast, dropout, A, B, scaling, sum, cast back.
LORA_OPS = 7
# DoRA's: the adapter's product, its sum with the weight, the norm, the scaling, the second base product.
DORA_OPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Seconds of one direction (forward or backward) of a micro step, by part."""

    matmul_s: float = 0.0
    attention_s: float = 0.0
    traffic_s: float = 0.0  # elementwise operators
    head_s: float = 0.0
    launch_s: float = 0.0  # Python's, concurrent with the device's work on a GPU

    @property
    def device_s(self) -> float:
        return self.matmul_s + self.attention_s + self.traffic_s + self.head_s

    def wall_s(self, rates: Rates) -> float:
        """Return the elapsed time: on a GPU, kernels run while Python launches the next ones."""
        if rates.launches_overlap:
            return max(self.device_s, self.launch_s)
        return self.device_s + CPU_OP_RATIO * self.launch_s

    def plus(self, other: Phase) -> Phase:
        return Phase(
            matmul_s=self.matmul_s + other.matmul_s,
            attention_s=self.attention_s + other.attention_s,
            traffic_s=self.traffic_s + other.traffic_s,
            head_s=self.head_s + other.head_s,
            launch_s=self.launch_s + other.launch_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStep:
    """The shape of one forward and backward pass."""

    batch: int
    length: float  # padded tokens of each example
    num_scored: float  # positions of the whole micro batch that the head scores
    is_masked: bool  # padded: attention cannot skip the half above the diagonal
    plain_head: bool  # transformers' own loss over full logits, not trl's chunked head
    mean_square: float | None = None  # of the examples' lengths, where they differ: the cost of attention
    num_calls: int = 1  # calls of attention per layer

    @property
    def num_tokens(self) -> float:
        return self.batch * self.length


def compute_bytes(precision: Precision) -> int:
    """Return the bytes of an element in matrix products."""
    return FP32_BYTES if precision is Precision.FP32 else 2


def lora_targets(model: ModelProfile, adapter: AdapterSettings) -> tuple[LinearGroup, ...]:
    """Return the linear layers that an adapter adapts."""
    if adapter.targets == "all-linear":
        return tuple(group for group in model.linear_groups if group.in_all_linear)
    targets = (adapter.targets,) if isinstance(adapter.targets, str) else adapter.targets
    return tuple(group for group in model.linear_groups if group.is_linear and group.name in targets)


def is_on_linear_layers(model: ModelProfile, adapter: AdapterSettings) -> bool:
    """Return whether an adapter adapts only the blocks' linear layers, which are counted by name."""
    groups = lora_targets(model, adapter)
    names = {group.name for group in groups}
    targets = names if adapter.targets == "all-linear" else adapter.targets
    return set(targets) <= names and all(group.active_share == 1.0 for group in groups)


def num_trained(model: ModelProfile, recipe: StepRecipe) -> int:
    """Return the parameters that the optimizer updates."""
    if recipe.adapter is None:
        return model.num_trainable
    if recipe.adapter.kind != "lora" or not is_on_linear_layers(model, recipe.adapter):
        return trainable.num_trained(
            model.config_json, recipe.adapter, trust_remote_code=model.trust_remote_code
        )
    rank = recipe.adapter.rank
    dora = 1 if recipe.adapter.use_dora else 0
    return sum(
        group.count * (rank * (group.in_features + group.out_features) + dora * group.out_features)
        for group in lora_targets(model, recipe.adapter)
    )


def saved_bytes(model: ModelProfile, recipe: StepRecipe) -> int:
    """Return the bytes of a saved checkpoint's weights: the whole model, or only the adapter.

    peft keeps adapters on 16-bit weights in fp32; trl casts QLoRA's to bf16, except with a loss scaler, which
    needs fp32.
    """
    if recipe.adapter is None:
        return model.num_parameters * recipe.precision.weight_bytes
    is_bf16 = recipe.method is Method.QLORA and not recipe.precision.scales_loss
    return num_trained(model, recipe) * (2 if is_bf16 else FP32_BYTES)


def resume_state_bytes(model: ModelProfile, recipe: StepRecipe) -> int:
    """Return the bytes of the optimizer's saved state: unknown optimizers count as Adam."""
    size = FP32_BYTES if recipe.adapter is not None else recipe.precision.weight_bytes
    num_moments = 0 if recipe.optimizer in ("sgd", "adafactor") else 1 if "lion" in recipe.optimizer else 2
    return num_trained(model, recipe) * num_moments * (1 if "8bit" in recipe.optimizer else size)


def forward(model: ModelProfile, recipe: StepRecipe, step: MicroStep, rates: Rates) -> Phase:
    """Return the forward pass without the head."""
    size, tokens = compute_bytes(recipe.precision), step.num_tokens
    products = 0.0
    for group in model.linear_groups:
        seen = tokens * group.active_share
        products += group.count * _product_s(rates, seen, group.out_features, group.in_features, size)
    block_s, _ = _block_s(model, recipe.precision, tokens, rates)
    cast_s = _cast_traffic(model, recipe) / rates.memory_bytes_per_s
    phase = Phase(
        matmul_s=products,
        attention_s=_attention_s(model, recipe, step, rates, flops=4, share=ATTENTION_FORWARD_SHARE),
        traffic_s=block_s + cast_s,
        launch_s=model.num_layers * _num_ops(step) * FORWARD_OP_S,
    )
    return phase if recipe.adapter is None else phase.plus(_lora_forward(model, recipe.adapter, step, rates))


def backward(model: ModelProfile, recipe: StepRecipe, step: MicroStep, rates: Rates) -> Phase:
    """Return the backward pass without the head and without recomputation.

    Includes gradients of inputs everywhere, and gradients of weights where these are trained.
    """
    size, tokens = compute_bytes(recipe.precision), step.num_tokens
    products = 0.0
    for group in model.linear_groups:
        seen = tokens * group.active_share
        products += group.count * _product_s(rates, seen, group.in_features, group.out_features, size)
        if recipe.adapter is None:
            products += group.count * _product_s(rates, group.in_features, group.out_features, seen, size)
    _, block_s = _block_s(model, recipe.precision, tokens, rates)
    cast_s = 0.0
    if recipe.adapter is None or recipe.method is Method.QLORA:  # 16-bit gradients to fp32; weights unpacked
        cast_s = _cast_traffic(model, recipe) / rates.memory_bytes_per_s
    phase = Phase(
        matmul_s=products,
        attention_s=_attention_s(model, recipe, step, rates, flops=10, share=ATTENTION_BACKWARD_SHARE),
        traffic_s=block_s + cast_s,
        launch_s=2 * model.num_layers * _num_ops(step) * BACKWARD_OP_S,
    )
    return phase if recipe.adapter is None else phase.plus(_lora_backward(model, recipe.adapter, step, rates))


def _num_ops(step: MicroStep) -> int:
    return BLOCK_OPS + (step.num_calls - 1) * ATTENTION_CALL_OPS


def head(model: ModelProfile, recipe: StepRecipe, step: MicroStep, rates: Rates) -> tuple[Phase, Phase]:
    """Return the output head and loss, forward and backward.

    trl's chunked head recomputes each tile of the logits in the backward pass, and accumulates a trained
    head's gradient in fp32; the plain head stores fp32 logits.  On CPUs ours makes gradients with logits.
    """
    size, scored = compute_bytes(recipe.precision), step.num_scored
    hidden, vocab = model.hidden_size, model.vocab_size
    logits = scored * vocab
    product = _product_s(rates, scored, vocab, hidden, size)
    grads = _product_s(rates, scored, hidden, vocab, size)
    if recipe.adapter is None:
        grads += _product_s(rates, vocab, hidden, scored, size)
    moved_per_s = rates.memory_bytes_per_s
    if step.plain_head:
        # Upcast, log_softmax, nll; their backward and the downcast: 18 and 24 bytes per logit.
        forward_traffic, backward_traffic = 18.0 * logits, 24.0 * logits
    elif rates.launches_overlap:
        forward_traffic, backward_traffic = size * logits, 2.0 * size * logits + 8.0 * hidden * vocab
        grads += product
    elif recipe.precision is Precision.FP32 and vocab <= ONE_PASS_VOCABULARY:
        # `profiles.memory.trace.one_pass_head`, operator by operator.
        forward_traffic, backward_traffic = 40.0 * logits, 8.0 * logits
        moved_per_s = rates.reused_bytes_per_s * HEAD_OPERATOR_SHARE
    else:
        # Off CUDA the tiles are folded by torch operators, counted in trl's `_forward_tile` and
        # `_backward_tile`: each reads its fp32 inputs and writes its result.
        forward_traffic, backward_traffic = 72.0 * logits, 98.0 * logits
        grads += product
        moved_per_s = rates.reused_bytes_per_s * HEAD_OPERATOR_SHARE
    return (
        Phase(head_s=product + forward_traffic / moved_per_s),
        Phase(head_s=grads + backward_traffic / moved_per_s),
    )


# Bytes that an optimizer's step moves per trained parameter, over the bytes of parameter p, gradient g and
# one state s; from torch.optim's foreach (one pass over memory an operator) and fused kernels.
_FOREACH_PASSES = 20  # AdamW: 2 decay, 3 first moment, 5 second, 6 denominator, 4 update
_OPTIMIZER_BYTES: Mapping[str, tuple[float, float, float]] = {
    "adamw_torch_fused": (2, 1, 4),
    "adamw_torch": (6, 2, 12),
    "adamw_torch_8bit": (2, 1, 1),
    "adamw_torch_4bit": (2, 1, 0.5),
    "adamw_bnb_8bit": (2, 1, 1),
    "adamw_8bit": (2, 1, 1),
    "paged_adamw_8bit": (2, 1, 1),
    "paged_adamw_32bit": (2, 1, 4),
    "paged_adamw": (2, 1, 4),
    "sgd": (2, 1, 0),
    "lion_32bit": (2, 1, 2),
    "lion_8bit": (2, 1, 0.5),
    "paged_lion_32bit": (2, 1, 2),
    "paged_lion_8bit": (2, 1, 0.5),
    "adafactor": (6, 4, 0),
}


def optimizer_s(model: ModelProfile, recipe: StepRecipe, rates: Rates) -> float:
    """Return the seconds of clipping and one optimizer step on one device."""
    # peft keeps adapters in fp32 on 16-bit weights.
    size = FP32_BYTES if recipe.adapter is not None else recipe.precision.weight_bytes
    parameters, gradients, states = _OPTIMIZER_BYTES.get(recipe.optimizer, _OPTIMIZER_BYTES["adamw_torch"])
    clipping = 3 if recipe.max_grad_norm > 0 else 0  # the norm reads them, scaling reads and writes
    num_bytes = num_trained(model, recipe) * size * (parameters + gradients + states + clipping)
    groups = model.linear_groups if recipe.adapter is None else lora_targets(model, recipe.adapter)
    num_tensors = 2 * sum(group.count for group in groups)  # weight and norm or bias; A and B
    launch_s = FORWARD_OP_S * (100 + num_tensors)
    traffic_s = num_bytes / rates.reused_bytes_per_s
    return max(traffic_s, launch_s) if rates.launches_overlap else traffic_s + launch_s


def accumulation_s(model: ModelProfile, recipe: StepRecipe, rates: Rates) -> float:
    """Return the seconds of adding another micro step's gradients to the accumulated ones."""
    size = FP32_BYTES if recipe.adapter is not None else recipe.precision.weight_bytes
    return 3 * size * num_trained(model, recipe) / rates.reused_bytes_per_s


def _product_s(rates: Rates, m: float, n: float, k: float, size: int) -> float:
    return matmul_s(rates, m, n, k, element_bytes=size)


def _block_s(model: ModelProfile, precision: Precision, tokens: float, rates: Rates) -> tuple[float, float]:
    """Return the seconds of all blocks' elementwise operators, forward and backward.

    Counted operator by operator: each reads its inputs and writes its result.
    """
    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_dim
    rotated = query + model.num_key_value_heads * model.head_dim
    inner = max((group.out_features for group in model.linear_groups), default=4 * hidden)
    match precision:
        case Precision.FP32:
            size, norm, residual = 4, 28, 12
        case Precision.BF16 | Precision.BF16_STOCHASTIC | Precision.FP16:
            size, norm, residual = 2, 36, 6  # the norm works on an fp32 copy
        case _:
            size, norm, residual = 2, 28 + 15, 10  # fp32 residuals, cast anew for each linear layer
    rotary = 10 * size * rotated  # negate, concatenate, two products, a sum
    heads = 2 * size * query  # transposed back into one row a token
    narrow = operators_s(rates, model.num_layers * tokens, result_bytes=tokens * hidden * FP32_BYTES)
    wide = operators_s(rates, model.num_layers * tokens, result_bytes=tokens * inner * FP32_BYTES)
    forward_s = narrow * (2 * (norm + residual) * hidden + rotary + heads) + wide * 5 * size * inner
    backward_s = narrow * (2 * (2 * norm + residual) * hidden + rotary + heads) + wide * 9 * size * inner
    return forward_s, backward_s


def _cast_traffic(model: ModelProfile, recipe: StepRecipe) -> float:
    """Return the bytes moved to make 16-bit weights once per pass: autocast's copies, or unpacked NF4."""
    num_weights = sum(group.num_weights for group in model.linear_groups)
    if recipe.method is Method.QLORA:
        return num_weights * (0.5 + 2 + 2 + 2)  # unpack, and cast to the compute dtype
    if recipe.precision in (Precision.BF16_AUTOCAST, Precision.FP16_AUTOCAST):
        return num_weights * (FP32_BYTES + 2)
    return 0.0


def _attention_s(
    model: ModelProfile, recipe: StepRecipe, step: MicroStep, rates: Rates, *, flops: int, share: float
) -> float:
    """Return softmax(QK)V: 4 flops a score and channel forward, 10 backward (Dao 2023), causal skips half.

    Fused kernels near `share` of the product rate at long sequences and half of that at ATTENTION_HALF.
    """
    channels = model.num_attention_heads * model.head_dim
    scores = step.num_tokens * step.length if step.mean_square is None else step.batch * step.mean_square
    if rates.num_sms:
        share *= step.length / (step.length + ATTENTION_HALF_LENGTH)
    skipped = 1.0 if step.is_masked else 0.5
    seconds = flops * scores * channels * skipped / (rates.matmul_flops_per_s * share)
    if recipe.attention == "eager":
        # Scores are written and read by scaling, mask, an fp32 softmax and two products.
        size = compute_bytes(recipe.precision)
        seconds += scores * model.num_attention_heads * (8 * size + 8) * flops / 4 / rates.memory_bytes_per_s
    return model.num_layers * seconds


def _lora_forward(model: ModelProfile, adapter: AdapterSettings, step: MicroStep, rates: Rates) -> Phase:
    """Return the time that peft's layers add: fp32 adapters on inputs cast to fp32, results cast back."""
    return _lora(model, adapter, step, rates, products=1, input_bytes=6, output_bytes=24, op_s=FORWARD_OP_S)


def _lora_backward(model: ModelProfile, adapter: AdapterSettings, step: MicroStep, rates: Rates) -> Phase:
    return _lora(
        model, adapter, step, rates, products=2, input_bytes=12, output_bytes=20, op_s=2 * BACKWARD_OP_S
    )


def _lora(
    model: ModelProfile,
    adapter: AdapterSettings,
    step: MicroStep,
    rates: Rates,
    *,
    products: int,
    input_bytes: int,
    output_bytes: int,
    op_s: float,
) -> Phase:
    matmul = traffic_s = launch = 0.0
    for group in lora_targets(model, adapter):
        tokens = step.num_tokens * group.active_share
        inside, outside = group.in_features, group.out_features
        down_s = _product_s(rates, tokens, adapter.rank, inside, FP32_BYTES)
        up_s = _product_s(rates, tokens, outside, adapter.rank, FP32_BYTES)
        matmul += group.count * products * (down_s + up_s)
        for width, moved in ((inside, input_bytes), (outside, output_bytes)):
            result_bytes = tokens * width * FP32_BYTES
            traffic_s += operators_s(rates, group.count * tokens * moved * width, result_bytes=result_bytes)
        launch += group.count * LORA_OPS * op_s
        if adapter.use_dora:
            # The norm of the whole weight with its adapter added, and the base product once more.
            matmul += group.count * products * _product_s(rates, tokens, outside, inside, 2)
            traffic_s += group.count * 26 * inside * outside / rates.memory_bytes_per_s
            launch += group.count * DORA_OPS * op_s
    return Phase(matmul_s=matmul, traffic_s=traffic_s, launch_s=launch)
