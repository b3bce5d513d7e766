"""What decides the memory and the speed of one training step, as frozen values.

`scheduler.decide.planner` turns a trial's settings into a `StepRecipe` plus a micro batch;
`profiles.memory.estimate` and `profiles.speed.throughput` predict what that takes.  Names are those of trl,
peft and transformers where these have one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from autosft.profiles.user_code import UserCode


class Method(enum.Enum):
    """What is trained."""

    FULL = "full"  #: every parameter
    LORA = "lora"  #: low-rank adapters over frozen weights
    QLORA = "qlora"  #: low-rank adapters over frozen 4-bit (NF4) weights
    SPARSE = "sparse"  #: every nonzero parameter; zeros stay zero


class Precision(enum.Enum):
    """Formats of weights and arithmetic; pinned once per study."""

    FP32 = "fp32"  #: fp32 weights and arithmetic
    BF16_AUTOCAST = "bf16-autocast"  #: fp32 weights, bf16 arithmetic under autocast
    FP16_AUTOCAST = "fp16-autocast"  #: fp32 weights, fp16 arithmetic under autocast, loss scaler
    BF16 = "bf16"  #: bf16 weights, gradients, optimizer state and arithmetic
    #: bf16 weights, gradients and arithmetic; each step's result is rounded up or down at random, so that
    #: changes below a weight's precision are made on average instead of being lost
    BF16_STOCHASTIC = "bf16-stochastic"
    FP16 = "fp16"  #: frozen fp16 weights under an fp32 adapter, fp16 arithmetic under autocast, loss scaler

    @property
    def weight_dtype(self) -> str:
        """Torch's name for the dtype of the loaded weights; adapters over 16-bit weights are fp32."""
        if self.has_bf16_weights:
            return "bfloat16"
        return "float16" if self is Precision.FP16 else "float32"

    @property
    def has_bf16_weights(self) -> bool:
        return self in (Precision.BF16, Precision.BF16_STOCHASTIC)

    @property
    def rounds_stochastically(self) -> bool:
        return self is Precision.BF16_STOCHASTIC

    @property
    def weight_bytes(self) -> int:
        return 4 if self.weight_dtype == "float32" else 2

    @property
    def autocast_dtype(self) -> str | None:
        """Torch's name for the dtype of autocast, None without autocast."""
        if self.scales_loss:
            return "float16"
        return "bfloat16" if self is Precision.BF16_AUTOCAST else None

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler keeps small gradients within fp16's range."""
        return self in (Precision.FP16, Precision.FP16_AUTOCAST)


class Checkpointing(enum.Enum):
    """Activation checkpointing: whether the backward pass recomputes layers."""

    OFF = "off"
    NON_REENTRANT = "non-reentrant"
    REENTRANT = "reentrant"


class Sharding(enum.Enum):
    """How one trial uses several devices."""

    NONE = "none"  #: one device
    DDP = "ddp"  #: replicas, averaged gradients
    FSDP = "fsdp"  #: FSDP2 `fully_shard`: parameters, gradients and optimizer state split over devices


def why_not_trained(method: Method, precision: Precision) -> str:
    """Return the reason why a method cannot train in a precision; empty when it can."""
    if precision is Precision.FP16 and method in (Method.FULL, Method.SPARSE):
        return f"{precision.value} weights cannot be trained: torch's loss scaler refuses fp16 gradients"
    if precision.rounds_stochastically and method in (Method.LORA, Method.QLORA):
        return f"{precision.value} is for weights that are trained: {method.value} trains adapters"
    return ""


def why_tie_not_sharded(vocab_size: int, num_devices: int) -> str:
    """Return the reason why FSDP2 cannot train tied embeddings on so many devices; empty when it can.

    transformers puts the tied weight into two FSDP groups.  Where its rows do not divide evenly, each group
    pads a copy of the last shard (`FSDPParam.reset_sharded_param`, torch 2.13), and only one copy is trained.
    """
    if vocab_size % num_devices == 0:
        return ""
    return (
        f"tied embeddings of {vocab_size:,} rows split over {num_devices} devices: torch pads the last shard "
        "twice, and only one of the two would be trained"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """An adapter in peft's terms: LoRA, or another `kind` of `profiles.model.adapters.KINDS`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str  # module name suffixes, or peft's "all-linear"
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    kind: str = "lora"
    options: tuple[tuple[str, bool | int | float | str], ...] = ()  # further fields of peft's configuration


def adapter_kind(adapter: AdapterSettings | None) -> str:
    """Return the kind of an adapter, "lora" where there is no adapter."""
    return "lora" if adapter is None else adapter.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Prompts that the model answers at evaluations, as far as memory depends on them."""

    prompt_tokens: int  # of the longest prompt
    new_tokens: int  # of the longest answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrder:
    """What determines the examples of a run and their order (`profiles.dataset.order`)."""

    seed: int
    num_examples: int  # of the whole run: epochs times examples, rounded
    max_samples: int | None = None  # distinct ones, sampled with the seed; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecipe:
    """Everything that decides a step's memory and speed, except micro batch and lengths."""

    method: Method
    adapter: AdapterSettings | None  # set for LORA and QLORA, else None
    precision: Precision
    optimizer: str  # transformers' OptimizerNames value, e.g. "adamw_torch_fused"
    checkpointing: Checkpointing
    attention: str  # transformers' attn_implementation: "sdpa" or "eager"
    sharding: Sharding = Sharding.NONE
    data_parallel: int = 1
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    padding_free: bool = False  # the examples of a micro batch are packed into one row, without padding
    loss: UserCode | None = None  # f(outputs, labels, num_items_in_batch), on full logits
    trainer: UserCode | None = None  # a subclass of trl's SFTTrainer
    sorts_steps: bool = False  # an optimizer step's examples are sorted longest first, as in our trainer
    order: RunOrder | None = None  # decides the lengths of padding-free rows; None: not known
    max_rounds: int | None = None  # conversations are cut to the last so many rounds
    # Evaluations between steps; None where they equal the step's, or are not known yet
    eval_micro_batch: int | None = None
    eval_seq_len: int | None = None
    generation: Generation | None = None  # None: evaluations generate nothing

    @property
    def has_full_logits(self) -> bool:
        """Whether the loss needs the logits of all positions (a user's loss); else trl's chunked head."""
        return self.loss is not None or self.trainer is not None

    @property
    def traces_shards(self) -> bool:
        """Whether the step is traced as one rank of FSDP2 runs it: always, except with a user's trainer."""
        return self.sharding is Sharding.FSDP and self.data_parallel > 1 and self.trainer is None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthProfile:
    """Token lengths of the training examples, as the collator will see them.

    Example i has `lengths[i]` tokens after truncation, of which `scored[i]` carry a label.  Ordered by
    example id.  `max_length` is the truncation length.
    """

    lengths: tuple[int, ...]
    scored: tuple[int, ...]
    max_length: int

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A predicted number of bytes: the median, and an upper bound that is rarely exceeded."""

    median_bytes: int
    upper_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """The predicted seconds of a run, by activity.

    Each of `num_evaluations` also writes a checkpoint and, where a study scores answers, generates them.
    """

    start_s: float  # starting the process, loading weights, rehearsing the largest micro batch
    training_s: float  # all optimizer steps
    num_evaluations: int = 0
    evaluation_s: float = 0.0  # each
    answers_s: float = 0.0  # generating, at each evaluation
    checkpoint_s: float = 0.0  # each

    @property
    def total_s(self) -> float:
        each_s = self.evaluation_s + self.answers_s + self.checkpoint_s
        return self.start_s + self.training_s + self.num_evaluations * each_s

    def at_speed(self, ratio: float) -> RunTime:
        """Return the times on a device that computes `ratio` times as fast; its disk is the same."""
        return replace(
            self,
            training_s=self.training_s / ratio,
            evaluation_s=self.evaluation_s / ratio,
            answers_s=self.answers_s / ratio,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """The predicted peak of a training process on one device.

    allocated   what tensors need at the peak
    need        the smallest cap under which the run succeeds; "fits" means that `need.upper_bytes`
                plus `outside_bytes` is at most the device's free memory
    uncapped    what the caching allocator would reserve on a device without limit
    outside     memory outside the allocator: context, workspaces, communication (CPU: 0)
    components  bytes at the peak by owner, adding up to `allocated.median_bytes`; keys are
                "parameters", "gradients", "optimizer state", "activations", "logits and loss",
                "inputs", "workspace"
    """

    allocated: ByteRange
    need: ByteRange
    uncapped: ByteRange
    outside_bytes: int
    components: tuple[tuple[str, int], ...]
    peak_phase: str  # "forward", "loss backward", "layer backward", "optimizer", "evaluation", "generation"
    peak_owner: str  # for users: what owns the peak and what would lower it
    method: str  # how it was predicted: "trace and replay" (and what of it is modelled), "closed form"
    bound_level: float  # stated coverage of the upper bounds, 0..1
    num_calibration_rows: int
    untraced: tuple[str, ...]  # operators that the trace could not follow; not empty: no claim to fit
    # What a measured peak is compared with for calibration (profiles.memory.calibration.row_of):
    uncalibrated_bytes: int = 0  # allocated, before calibration
    stack: str = ""  # the stack that the bound belongs to
    phases: tuple[tuple[str, int], ...] = ()  # phase of the run -> peak bytes allocated in it
    way_out: str = ""  # a sentence: how to make the step traceable
    # How a measured peak is scaled where it replaces a prediction (scheduler.decide.measured_memory):
    floor_bytes: int = 0  # weights and optimizer state, independent of the micro batch
    longest: int = 0  # tokens of the longest training example; 0: not known
    refused: str = ""  # why such a step must not run, whatever memory is available

    @property
    def total_bytes(self) -> int:
        """Upper bound of what the device must have free: need plus what lies outside the allocator."""
        return self.need.upper_bytes + self.outside_bytes
