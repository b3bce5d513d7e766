"""bf16 on CPUs: oneDNN compiles a kernel for every shape of a product, and keeps it.

In torch 2.13 each new row length leaves 10 to 12 MiB of compiled kernels behind, and 22 to 28 MiB of mapped
memory, which a trial's limit counts (measured on an AMD EPYC with avx512_bf16;
`findings/torch_cpu_bf16_keeps_kernels.sh`).  Rows as long as their longest example would grow a trial by
gigabytes.  So rows, and the positions that the head scores, are padded to one of few sizes; padding has no
label and no attention, so that losses are the same up to rounding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.recipe import ByteRange, LengthProfile, MemoryEstimate, Method, Precision, StepRecipe

if TYPE_CHECKING:
    from autosft.profiles.model.profile import ModelProfile

#: Sizes are multiples of this, above 1,024 of an eighth of the power of two below: at most 16 up to 1,024.
STEP = 64
#: Resident bytes of a product's three kernels (forward pass, gradients of input and weight) for one row
#: length, and of everything else that is compiled for it, attention first.  Measured with Llama, Qwen3 and
#: GPT-NeoX, full and LoRA, 192 and 640 wide: 8.4 to 18.4 MiB a length, which these give within 10 %.
PRODUCT_BYTES, LENGTH_BYTES = 1_200_000, 5 << 20
#: Of that, the share of a forward pass alone.
FORWARD_SHARE = 0.4
#: What the first product of a process takes besides.
FIRST_BYTES = 6 << 20
#: Mapped but never touched, over all lengths of a run, and counted by its limit
#: (`workers.processes.memory_limit`).
UNTOUCHED_BYTES = 512 << 20
#: A row length that fewer micro batches have is not counted in the median.
RARE = 1 / 64


def compiles_per_shape(precision: Precision, kind: DeviceKind) -> bool:
    """Whether a device compiles its products for each shape: a CPU in 16 bits."""
    return precision is not Precision.FP32 and not kind.traits.trains_in_16_bit


def padded_size(num_tokens: int) -> int:
    """Return the size that so many tokens are padded to."""
    step = max(STEP, 1 << max(0, num_tokens.bit_length() - 4))
    return -(-num_tokens // step) * step


def padded_lengths(lengths: LengthProfile) -> LengthProfile:
    """Return examples as long as the rows that they make: padded, but never beyond the truncation length."""
    most = lengths.max_length
    longer = tuple(min(padded_size(length), most) for length in lengths.lengths)
    scored = tuple(
        min(padded_size(number), length) if number else 0
        for number, length in zip(lengths.scored, longer, strict=True)
    )
    return replace(lengths, lengths=longer, scored=scored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What compiled kernels hold of a trial's memory: usually, and where every row length occurs."""

    usual_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a trial trains and evaluates: `padded_lengths`, and how many rows a micro batch has."""

    micro_batch: int
    lengths: LengthProfile
    evaluated: LengthProfile | None


def kernels(model: ModelProfile, recipe: StepRecipe, rows: Rows) -> Kernels | None:
    """Return what a trial's kernels take; None where that is not known.

    It is known for dense models with attention whose micro batches are padded.  Evaluations have batches, and
    so products, of their own.
    """
    if not is_known(model, recipe):
        return None
    each = _num_products(model, recipe) * PRODUCT_BYTES + LENGTH_BYTES
    num_evaluated = 0 if rows.evaluated is None else len(set(rows.evaluated.lengths))
    evaluation = int(num_evaluated * each * FORWARD_SHARE)
    usual, every = (_num_lengths(rows, least=least) for least in (RARE, 0.0))
    return Kernels(
        usual_bytes=FIRST_BYTES + usual * each + evaluation,
        most_bytes=FIRST_BYTES + int(1.1 * every * each) + evaluation,
    )


def is_known(model: ModelProfile, recipe: StepRecipe) -> bool:
    """Whether it is known what a step's kernels take."""
    in_bf16 = recipe.precision in (Precision.BF16, Precision.BF16_AUTOCAST)
    is_dense = model.num_attention_heads > 0 and not is_sparse_mixture(model)
    is_padded = not (recipe.padding_free or recipe.has_full_logits or recipe.generation is not None)
    return in_bf16 and is_dense and is_padded and recipe.method is not Method.QLORA


def is_sparse_mixture(model: ModelProfile) -> bool:
    """Whether tokens go to experts, whose products have as many rows as tokens choose them."""
    return "expert" in model.config_json


def with_kernels(memory: MemoryEstimate, kernels: Kernels) -> MemoryEstimate:
    """Return the memory of a trial with what its kernels take, which is no tensor."""

    def more(given: ByteRange) -> ByteRange:
        return ByteRange(
            median_bytes=given.median_bytes + kernels.usual_bytes,
            upper_bytes=given.upper_bytes + kernels.most_bytes,
        )

    parts = {**dict(memory.components)}
    parts["workspace"] = parts.get("workspace", 0) + kernels.usual_bytes
    return replace(
        memory,
        allocated=more(memory.allocated),
        need=more(memory.need),
        uncapped=more(memory.uncapped),
        components=tuple(parts.items()),
        uncalibrated_bytes=memory.uncalibrated_bytes and memory.uncalibrated_bytes + kernels.usual_bytes,
    )


def _num_products(model: ModelProfile, recipe: StepRecipe) -> int:
    """Return the number of different products in a forward pass: of weights, of adapters, of the head."""
    shapes = {(group.in_features, group.out_features) for group in model.linear_groups}
    if recipe.adapter is None:
        return len(shapes) + 1
    return len(shapes) + len({pair[0] for pair in shapes}) + len({pair[1] for pair in shapes}) + 1


def _num_lengths(rows: Rows, *, least: float) -> int:
    """Return how many lengths more than `least` of all micro batches in random order have."""
    lengths = rows.lengths.lengths
    counts = sorted(Counter(lengths).items())
    number, below, before = 0, 0, 0.0
    for _, count in counts:
        below += count
        share = (below / len(lengths)) ** rows.micro_batch  # of micro batches that are no longer
        number += share - before > least
        before = share
    return number
