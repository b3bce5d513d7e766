"""The optimizers of `--optimizer`: what each needs, keeps and follows, or why it is refused.

One row for each of transformers' OptimizerNames.  What may be asked for, what memory is predicted for its
state, what is checked after the first step, `--optimizer help` and docs/optimizers.md follow from the rows;
tests/workers/training/test_optim_names.py holds each to what its library does.
"""

from __future__ import annotations

import difflib
import enum
import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Precision


class Decay(enum.Enum):
    """What becomes of the weight decay that is asked for."""

    OF_WEIGHTS = "yes"  #: each step takes rate x decay off every decayed weight
    #: as for weights, and the rate is what is left of it where an update is clipped
    WITH_CLIPPED_RATE = "by the clipped rate"
    IN_GRADIENT = "no"  #: added to the gradient, and then scaled as gradients are


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What an optimizer keeps for a weight tensor.

    `moments` values for each weight: in `bits` each, or None for the weights' own precision.  Quantized ones
    have a scale in fp32 for each `block` of values, and stay whole (fp32 in bitsandbytes, the weights'
    precision in torchao) in tensors of fewer than `min_values` values.
    """

    moments: int
    bits: int | None = None
    block: int = 256
    min_values: int = 4096
    blocks_divide: bool = False  # whether a tensor that blocks do not divide stays whole
    whole_bits: int | None = 32  # of what stays whole; None: the weights' own precision
    whole_embeddings: bool = False
    table_bytes: int = 0  # what codes stand for: beside each quantized tensor
    shared_table_bytes: int = 0  # the same, once for all
    scalar_bytes: int = 0  # beside each tensor
    scalars: int = 0  # the same, in the weights' own precision
    compensates: bool = False  # another value for each weight of 16 bits: what rounding has lost
    is_factored: bool = False  # of a matrix a value for each row and each column

    def is_quantized(self, num_values: int, *, is_embedding: bool) -> bool:
        """Whether the state of such a tensor is kept in fewer bits."""
        if self.bits is None or self.bits >= 16:
            return False
        is_whole = num_values < self.min_values or (self.whole_embeddings and is_embedding)
        return not is_whole and not (self.blocks_divide and num_values % self.block)

    def bytes_of(self, shape: Sequence[int], weight_bytes: int, *, is_embedding: bool = False) -> int:
        """Return the bytes that are kept for a tensor of such a shape, apart from tables that all share."""
        num_values = math.prod(shape)
        beside = self.scalar_bytes + self.scalars * weight_bytes
        if self.is_factored and len(shape) >= 2:
            rows = num_values // shape[-1]
            columns = num_values // shape[-2]
            return (rows + columns) * weight_bytes + beside
        if self.is_quantized(num_values, is_embedding=is_embedding):
            assert self.bits is not None
            blocks = -(-num_values // self.block)
            moment = num_values * self.bits // 8
            scales = 4 * blocks * self.moments + self.table_bytes
            return moment * self.moments + scales + beside
        bits = self.whole_bits if self.bits is not None else None
        value = weight_bytes if bits is None else bits // 8
        lost = weight_bytes if self.compensates and weight_bytes == 2 else 0
        return num_values * (value * self.moments + lost) + beside

    def bytes_per_weight(self, weight_bytes: int) -> float:
        """Return what a weight of a large matrix takes."""
        side = 4096
        return self.bytes_of((side, side), weight_bytes) / side**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer by transformers' name; one that is `refused` has a `nearest` that is not."""

    name: str
    package: str = ""  # on the package index; empty: part of what autosft needs
    module: str = ""  # that the package is imported as
    state: State | None = None  # None: refused
    #: Tensors of a weight's size that a step makes on its way, weight after weight or of all at once.
    copies: int = 0
    copies_all: bool = False
    cpu_copies: int = 0  # the same on a CPU, in fp32, weight after weight: the most that was measured
    pages: bool = False  # large state lies in host memory: a GPU is needed
    shards: bool = True  # whether FSDP2 can split it
    decay: Decay = Decay.OF_WEIGHTS
    #: How far a weight moves in the very first step at most, in units of the rate; None: not bounded.
    first_move: float | None = None
    trains_16_bit: bool = True  # whether it can train bf16 weights
    rounds_stochastically: bool = False  # whether it can round bf16 weights at random
    averages: bool = False  # what is evaluated and saved is an average over steps
    refused: str = ""
    nearest: str = ""
    remark: str = ""

    @property
    def is_proven(self) -> bool:
        return not self.refused

    @property
    def modelled_as(self) -> tuple[object, ...]:
        """What the memory model takes from the row."""
        return (self.state, self.pages, self.copies, self.copies_all, self.cpu_copies)

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported here."""
        return not self.module or importlib.util.find_spec(self.module) is not None


def _blockwise(moments: int, bits: int) -> State:
    """Return bitsandbytes' state: blocks of 256 values; embeddings and small tensors stay in fp32."""
    table_bytes = 1024 * min(moments, 2) if bits == 8 else 0
    return State(moments=moments, bits=bits, whole_embeddings=True, shared_table_bytes=table_bytes)


def _of_bitsandbytes(
    name: str, moments: int, bits: int, first_move: float | None, remark: str = "", **fields: object
) -> Optimizer:
    return Optimizer(
        name=name,
        package="bitsandbytes",
        module="bitsandbytes",
        state=_blockwise(moments, bits),
        pages=name.startswith("paged"),
        shards=False,
        first_move=first_move,
        cpu_copies={(32, False): 3, (8, False): 5, (32, True): 4, (8, True): 10}[bits, moments == 3],
        remark=remark + ("embeddings and tensors below 4,096 values keep fp32 moments" if bits == 8 else ""),
        **fields,  # type: ignore[arg-type]
    )


def _of_torchao(name: str, bits: int, remark: str) -> Optimizer:
    return Optimizer(
        name=name,
        package="torchao",
        module="torchao",
        state=State(
            moments=2,
            bits=bits,
            blocks_divide=True,
            whole_bits=None,
            table_bytes=2 * 4 * 2**bits,
            scalar_bytes=4,
        ),
        shards=False,
        first_move=1.0,
        rounds_stochastically=True,
        cpu_copies=7,
        remark=remark,
    )


def _refused(name: str, reason: str, nearest: str) -> Optimizer:
    return Optimizer(name=name, refused=reason, nearest=nearest)


_TWO_MOMENTS = State(moments=2, scalar_bytes=4)
_LOW_RANK = (
    "it needs target modules and projects their gradients, but weight decay is lost, and what it has "
    "projected onto is not saved: a resumed run goes another way"
)
_LAYERWISE = (
    "it steps inside the backward pass: every step has the base rate whatever the schedule says, gradients "
    "are not clipped, and its moments are not saved"
)
_IN_BACKWARD = (
    "it steps at each micro batch instead of each effective batch, inside the backward pass: no weight "
    "decay, and gradients are not clipped as asked"
)
_DECAY_REMARK = "weight decay goes through the gradient: only with --weight-decay 0"

_ROWS = (
    Optimizer(
        name="adamw_torch_fused",
        state=_TWO_MOMENTS,
        first_move=1.0,
        remark="the default; of bf16 weights, changes below 1 in 256 are lost",
    ),
    Optimizer(
        name="adamw_torch",
        state=_TWO_MOMENTS,
        first_move=1.0,
        remark="the same, in several operations: copies the weights on a GPU (foreach), slower on a CPU",
    ),
    Optimizer(
        name="adafactor",
        state=State(moments=1, is_factored=True, scalar_bytes=4),
        remark="no momentum; the betas of Adam do not apply",
    ),
    Optimizer(
        name="sgd", state=State(moments=0), remark="no momentum; wants rates 100 times AdamW's and more"
    ),
    Optimizer(
        name="adagrad",
        state=State(moments=1, scalar_bytes=4),
        decay=Decay.IN_GRADIENT,
        first_move=1.0,
        remark=f"its steps only get smaller; {_DECAY_REMARK}",
    ),
    Optimizer(
        name="rmsprop",
        state=State(moments=1, scalar_bytes=4),
        decay=Decay.IN_GRADIENT,
        first_move=10.0,
        remark=f"its first steps are 10 times the rate; {_DECAY_REMARK}",
    ),
    _of_torchao("adamw_torch_8bit", 8, "on a GPU torch compiles its step for a minute or two"),
    _of_torchao("adamw_torch_4bit", 4, "the same; a higher loss than 8 bits at small rates"),
    _of_bitsandbytes("adamw_8bit", 2, 8, 1.0),
    _of_bitsandbytes("adamw_bnb_8bit", 2, 8, 1.0, "another name of adamw_8bit: "),
    _of_bitsandbytes("ademamix", 3, 32, 1.0, "alpha 5, beta 3 0.9999"),
    _of_bitsandbytes("ademamix_8bit", 3, 8, 1.0),
    _of_bitsandbytes("lion_32bit", 1, 32, 1.0, "wants about a tenth of AdamW's rate"),
    _of_bitsandbytes("lion_8bit", 1, 8, 1.0, "wants about a tenth of AdamW's rate; "),
    _of_bitsandbytes(
        "rmsprop_bnb", 1, 32, 10.0, f"betas do not apply; {_DECAY_REMARK}", decay=Decay.IN_GRADIENT
    ),
    _of_bitsandbytes(
        "rmsprop_bnb_32bit", 1, 32, 10.0, f"betas do not apply; {_DECAY_REMARK}", decay=Decay.IN_GRADIENT
    ),
    _of_bitsandbytes(
        "rmsprop_bnb_8bit", 1, 8, 10.0, f"betas do not apply; {_DECAY_REMARK}; ", decay=Decay.IN_GRADIENT
    ),
    _of_bitsandbytes("paged_adamw_32bit", 2, 32, 1.0),
    _of_bitsandbytes("paged_adamw_8bit", 2, 8, 1.0),
    _of_bitsandbytes("paged_ademamix_32bit", 3, 32, 1.0),
    _of_bitsandbytes("paged_ademamix_8bit", 3, 8, 1.0),
    _of_bitsandbytes("paged_lion_32bit", 1, 32, 1.0),
    _of_bitsandbytes("paged_lion_8bit", 1, 8, 1.0),
    Optimizer(
        name="stable_adamw",
        package="torch-optimi",
        module="optimi",
        state=State(moments=2, compensates=True, scalars=1),
        copies=2,
        decay=Decay.WITH_CLIPPED_RATE,
        shards=False,
        first_move=1.0,
        remark="the rate of a tensor whose update is large is clipped, and its weight decay with it",
    ),
    Optimizer(
        name="schedule_free_adamw",
        package="schedulefree",
        module="schedulefree",
        state=State(moments=2),
        copies=1,
        copies_all=True,
        shards=False,
        first_move=1.0,
        trains_16_bit=False,
        averages=True,
        remark="the schedule asked for applies; made for --lr-scheduler constant_with_warmup",
    ),
    Optimizer(
        name="schedule_free_sgd",
        package="schedulefree",
        module="schedulefree",
        state=State(moments=1),
        shards=False,
        trains_16_bit=False,
        averages=True,
        remark="the schedule asked for applies; wants rates 100 times AdamW's and more",
    ),
    _refused(
        "schedule_free_radam",
        "whatever warm-up is asked for, its first steps move nothing (five at a beta 2 of 0.999)",
        "schedule_free_adamw",
    ),
    _refused(
        "adamw_torch_xla", "it needs torch_xla, and autosft trains on CUDA and CPUs", "adamw_torch_fused"
    ),
    _refused(
        "adamw_torch_npu_fused",
        "it needs torch_npu, and autosft trains on CUDA and CPUs",
        "adamw_torch_fused",
    ),
    _refused("adamw_anyprecision", "it needs torchdistx, which is on no package index", "stable_adamw"),
    _refused("galore_adamw", _LOW_RANK, "adamw_torch_8bit"),
    _refused("galore_adamw_8bit", _LOW_RANK, "adamw_torch_8bit"),
    _refused("galore_adafactor", _LOW_RANK, "adafactor"),
    _refused("galore_adamw_layerwise", _LAYERWISE, "adamw_torch_8bit"),
    _refused("galore_adamw_8bit_layerwise", _LAYERWISE, "adamw_torch_8bit"),
    _refused("galore_adafactor_layerwise", _LAYERWISE, "adafactor"),
    _refused("apollo_adamw", _LOW_RANK, "adamw_torch_8bit"),
    _refused("apollo_adamw_layerwise", _LAYERWISE, "adamw_torch_8bit"),
    _refused("lomo", _IN_BACKWARD, "adafactor"),
    _refused("adalomo", _IN_BACKWARD, "adafactor"),
    _refused(
        "grokadamw",
        "its moments are not part of what is saved, so a resumed run goes another way, and the betas asked "
        "for do not reach it",
        "adamw_torch_fused",
    ),
)

#: The optimizer of a study that asks for none, and those of studies of earlier versions, which keep theirs:
#: the implementation is part of what the trials of a study have in common.
DEFAULT = "adamw_torch_fused"
FORMER_DEFAULTS = ("adamw_torch",)

#: Every optimizer by its name, the usual ones first.
OPTIMIZERS: dict[str, Optimizer] = {row.name: row for row in _ROWS}
HOW_TO_LIST = "autosft plan --optimizer help lists all of them."


def find_optimizer(name: str) -> Optimizer:
    """Return a proven optimizer.  Raises UserError for an unknown and for a refused one, with the nearest."""
    row = OPTIMIZERS.get(name)
    if row is None:
        nearest = difflib.get_close_matches(name, [row.name for row in _ROWS if row.is_proven], n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"--optimizer {name}: not an optimizer.", remedy=f"{hint}{listing()}")
    if row.refused:
        raise UserError(
            f"--optimizer {name} is refused: {row.refused}.",
            remedy=f"Use --optimizer {row.nearest}. {HOW_TO_LIST}",
        )
    return row


def require_optimizer(
    name: str,
    *,
    method: Method,
    on_gpu: bool,
    precision: Precision,
    largest_decay: float = 0.0,
    is_run_here: bool = True,
) -> None:
    """Raise UserError unless an optimizer does on such a device what is asked of it.

    `largest_decay`: the largest weight decay that it may be asked for.  `is_run_here`: whether its package
    has to be there.
    """
    row = find_optimizer(name)
    if row.pages and not on_gpu:
        unpaged = name.removeprefix("paged_")
        nearest = {"adamw_32bit": DEFAULT, "ademamix_32bit": "ademamix"}.get(unpaged, unpaged)
        raise UserError(
            f"--optimizer {name} needs a GPU: it moves its state to host memory, where a CPU's already is.",
            remedy=f"Use --optimizer {nearest}.",
        )
    if precision.rounds_stochastically and not row.rounds_stochastically:
        able = ", ".join(one.name for one in _ROWS if one.rounds_stochastically)
        raise UserError(
            f"--optimizer {name} --precision {precision.value}: it does not round stochastically.",
            remedy=f"Use one that does: {able}.",
        )
    if precision.has_bf16_weights and method is not Method.LORA and not row.trains_16_bit:
        raise UserError(
            f"--optimizer {name} --precision {precision.value}: changing between the weights that it trains "
            "and the average that it saves would round them.",
            remedy=f"Use --precision {Precision.BF16_AUTOCAST.value}, or --optimizer {DEFAULT}.",
        )
    if row.decay is Decay.IN_GRADIENT and largest_decay > 0:
        raise UserError(
            f"--optimizer {name} does not apply weight decay in the size that is asked for: it is added to "
            "the gradient, and divided by the gradient's size like it.",
            remedy=f"Use --weight-decay 0, or --optimizer {DEFAULT}, in a new study. One that an earlier "
            "version began so keeps its trials: autosft report and export show them, and autosft train "
            "best.yaml trains them as they were.",
        )
    if is_run_here and not row.is_installed:
        raise UserError(
            f"--optimizer {name} needs {row.package}, which is not installed.",
            remedy=f"Install it with: pip install {row.package}",
        )


def why_not_sharded(method: Method, precision: Precision, optimizer: str, adapter: str = "lora") -> str:
    """Return the reason why FSDP2 cannot shard such a training; empty when it can."""
    if method is Method.QLORA:
        return "--method qlora cannot be sharded: its 4-bit weights have no parts"
    if adapter != "lora":
        return f"--adapter {adapter} cannot be sharded: only LoRA adapters are known to shard correctly"
    if precision.scales_loss:
        return f"{precision.value} cannot be sharded: its loss scaler does not see other devices' gradients"
    if optimizer in OPTIMIZERS and not OPTIMIZERS[optimizer].shards:
        return f"the optimizer {optimizer} cannot be sharded"
    return ""


def needs(row: Optimizer) -> str:
    """Say what an optimizer needs beside autosft."""
    return " and ".join([*([row.package] if row.package else []), *(["a GPU"] if row.pages else [])]) or "-"


def bytes_in_words(row: Optimizer) -> str:
    """Say what an optimizer keeps for a weight of a large matrix: of fp32 and, where it differs, of bf16."""
    if row.state is None:
        return "-"
    fp32, bf16 = (f"{row.state.bytes_per_weight(size):.3g}" for size in (4, 2))
    return fp32 if fp32 == bf16 or not row.trains_16_bit else f"{fp32} (bf16: {bf16})"


def listing() -> str:
    """Return the proven optimizers as a table of text: name, bytes a parameter, what it needs."""
    lines = [("Known:", "bytes a parameter", "needs")]
    lines += [(row.name, bytes_in_words(row), needs(row)) for row in proven()]
    return "\n".join(f"  {name:<22} {size:<18} {what}".rstrip() for name, size, what in lines).strip()


def proven() -> Iterable[Optimizer]:
    """Yield the optimizers that can be asked for."""
    return (row for row in _ROWS if row.is_proven)
