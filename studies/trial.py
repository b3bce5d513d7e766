"""The values that travel between asking, planning, running and telling.  Frozen, without behaviour."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from autosft.profiles.recipe import (
    AdapterSettings,
    Checkpointing,
    Generation,
    MemoryEstimate,
    Method,
    Precision,
    RunOrder,
    RunTime,
    Sharding,
)
from autosft.profiles.user_code import UserCode
from autosft.studies.wire import WIRE_NAME


class TrialState(enum.Enum):
    """Where a trial is.  A trial is finished when it is COMPLETED, STOPPED or INFEASIBLE."""

    WAITING = "waiting"  #: asked, no device yet
    RUNNING = "running"  #: an attempt holds a device
    PAUSED = "paused"  #: at a rung or by the user, with a checkpoint and without a device
    COMPLETED = "completed"  #: ran to the end; also when the loss became non-finite (see FailureKind)
    STOPPED = "stopped"  #: ended early by the pruner or the user; its last measurement counts
    INFEASIBLE = "infeasible"  #: ran out of memory and no smaller plan is left
    FAILED = "failed"  #: the work itself is broken (bad data, a bug); does not count as finished

    @property
    def is_finished(self) -> bool:
        return self in (TrialState.COMPLETED, TrialState.STOPPED, TrialState.INFEASIBLE)

    @property
    def is_over(self) -> bool:
        return self.is_finished or self is TrialState.FAILED


class FailureKind(enum.Enum):
    """Why an attempt ended without its result.  Different facts, treated differently."""

    OUT_OF_MEMORY = "out of device memory"  #: tightens the calibration, planned again smaller
    #: the same while evaluating, which a smaller micro batch of training does not help
    EVALUATION_OUT_OF_MEMORY = "out of device memory while evaluating"
    HOST_OUT_OF_MEMORY = "out of host memory"  #: the kernel's OOM killer; tried again with fewer at once
    NON_FINITE_LOSS = "non-finite loss"  #: a result: the worst possible value
    #: the worker that was to run it could not be set up: ends the study, and the next run tries it again
    NOT_STARTED = "could not start"
    WORKER_LOST = "worker lost"  #: killed, node gone, hung; resumed from its last checkpoint
    #: a disk, folder, model or limit outside the trial: waited for, then ends the study; the trial waits
    SURROUNDINGS = "surroundings"
    BAD_DATA = "bad data"  #: the data cannot be trained on; not tried again
    STORAGE = "storage"  #: a URL's storage could not be reached for long; waited for like SURROUNDINGS
    DISK_FULL = "disk full"  #: no room for a checkpoint; tried again once there is
    ERROR = "error"  #: an exception in training; not tried again

    @property
    def is_out_of_device_memory(self) -> bool:
        return self in (FailureKind.OUT_OF_MEMORY, FailureKind.EVALUATION_OUT_OF_MEMORY)

    @property
    def is_of_surroundings(self) -> bool:
        """Whether it says nothing of the trial: the same settings would end well elsewhere, or later."""
        return self in (FailureKind.SURROUNDINGS, FailureKind.STORAGE)


class StopReason(enum.Enum):
    """Why a running attempt is told to end."""

    PRUNED = "pruned"  #: hopeless against its peers at the same number of training tokens
    USER = "stopped by the user"  #: `autosft studies stop`; the trial counts as stopped
    BUDGET = "time budget over"  #: the study's time is up; counts as stopped once it has been evaluated
    TARGET = "target reached"  #: what was wanted is there, and the study ends; counts as with BUDGET
    SHUTDOWN = "shutdown"  #: the study is being left; the trial is taken up again next time
    RUNG = "paused at a rung"  #: others of its rung are better so far; its last evaluation's checkpoint stays
    PAUSED = "paused by the user"  #: `autosft studies pause`; saves a checkpoint, waits for resume


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """All that changes what is learned.  The same settings are the same experiment on every machine."""

    learning_rate: float
    lr_scheduler: str  # transformers' SchedulerType value: "cosine", "linear", "constant_with_warmup"
    warmup_ratio: float  # share of the optimizer steps
    weight_decay: float
    effective_batch_size: int  # examples per optimizer step
    seq_len: int  # examples are truncated to this many tokens
    method: Method
    optimizer: str  # transformers' OptimizerNames value
    adapter: AdapterSettings | None = field(metadata={WIRE_NAME: "lora"})  # set for LORA and QLORA, else None
    num_train_examples: int  # the resource: examples seen in the whole run (epochs x data, rounded)
    max_grad_norm: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    seed: int  # initialisation of adapters and order of examples
    max_rounds: int | None = None  # learned from the prepared data that is cut to this; None: as it is
    max_train_samples: int | None = None  # only so many distinct examples, drawn by the seed; None: all

    @property
    def order(self) -> RunOrder:
        """What decides which examples are seen when."""
        return RunOrder(
            seed=self.seed, num_examples=self.num_train_examples, max_samples=self.max_train_samples
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedSettings:
    """Chosen once per study for the weakest device that takes part; never varied by planner or retry."""

    precision: Precision
    tf32: bool
    attention: str
    eval_seq_len: int
    eval_micro_batch: int  # 0 while it is not known yet: as many as a micro batch of training
    eval_fingerprint: str  # sha256 over the evaluation token ids and labels
    num_evaluations: int  # evaluations along a run, evenly spaced in training tokens, the last at its end
    loss: UserCode | None = None  # a user's loss function in the place of the mean over scored tokens
    trainer: UserCode | None = None  # a user's subclass of trl's SFTTrainer
    generation: Generation | None = None  # the longest of those prompts and answers; None without
    prompts_fingerprint: str = ""  # sha256 over the prompts of its metric; "" without
    padding_free: bool = False  # a micro batch is one row of examples; evaluations are padded
    packing: bool = False  # of studies before there was padding_free: never true


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """How a trial runs on the devices it is planned for; changes memory and speed, never the result.

    micro_batch x gradient_accumulation x data_parallel == effective_batch_size, exactly.
    """

    device_name: str
    micro_batch: int
    gradient_accumulation: int
    data_parallel: int
    checkpointing: Checkpointing
    sharding: Sharding
    num_threads: int  # CPU threads of the training process
    memory_cap_bytes: int  # enforced in the process; at least the estimate's upper bound
    estimate: MemoryEstimate
    predicted_tokens_per_s: float
    predicted_duration_s: float
    reason: str  # one sentence for the user: why this micro batch and not more
    device_share: float = 1.0  # predicted: of the time that a GPU is busy; the rest is Python's
    run_time: RunTime | None = None  # predicted_duration_s by what takes it
    speed_correction: float = 1.0  # by which measured trials have corrected the predicted speed
    #: Whether the attempt measures its memory, which nothing predicts: alone on its devices, under a cap of
    #: what is free there, with the largest training and evaluation batches rehearsed after the first step.
    measures_itself: bool = False
    eval_micro_batch: int | None = None  # None: as pinned; fewer where evaluating ran out of memory

    @property
    def predicted_bytes(self) -> int | None:
        """The most that was predicted to be needed of each device; None where nothing was."""
        return None if self.measures_itself else self.estimate.total_bytes

    @property
    def booked_bytes(self) -> int:
        """What is reserved on each device: the cap, and what the allocator does not see."""
        return self.memory_cap_bytes + self.estimate.outside_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScoring:
    """Prompts that every saved checkpoint answers, and whose answers are checked (IFEval)."""

    prompts: str  # a file of profiles.dataset.ifeval_prompts.write_prompts
    max_new_tokens: int
    incumbent: str | None = None  # what the study's best checkpoint followed, for others to be raced against


class Task(enum.Enum):
    """What an attempt is for."""

    TRAIN = "train"  #: to train the settings
    SCORE = "score"  #: to evaluate the checkpoint in `resume_from` on the examples kept for the final score
    UNTUNED = "untuned"  #: to evaluate the model as it is before tuning, on what trials are compared by


#: The place of a trial's number in the jobs of the model as it is before tuning.
UNTUNED_TRIAL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialJob:
    """One attempt at a trial, complete enough to run in another process on another machine."""

    study: str
    trial: int  # number within the study, from 0
    attempt: int  # from 1
    model: str  # folder or hub id
    data_dir: str  # prepared data (profiles.dataset.prepare): train/ and eval/ in Arrow, manifest.json
    output_dir: str  # of this trial; checkpoints go below it
    settings: TrainingSettings
    pinned: PinnedSettings
    plan: ExecutionPlan
    device_uuids: tuple[str, ...]
    resume_from: str | None  # a checkpoint folder with resume state, or None for the start
    save_resume_state: bool  # whether checkpoints carry optimizer, scheduler and RNG state
    trust_remote_code: bool
    scoring: PromptScoring | None = None
    report_to: tuple[str, ...] = ()  # transformers' names of trackers: "tensorboard", "wandb", "mlflow"
    task: Task = Task.TRAIN
    #: The URL that stands for output_dir, to which checkpoints and evaluations go; None: they stay there.
    store_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint folder holds."""

    num_bytes: int
    sha256: str  # of the manifest, "" where there is none
    has_resume_state: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What an attempt reports while it runs.

    A progress report has no metrics; an evaluation has them, and a checkpoint where one was written.
    """

    trial: int
    attempt: int
    step: int  # optimizer steps done
    num_steps: int  # of the whole run
    num_tokens: int  # non-padding training tokens seen
    loss: float | None  # mean training loss since the last report
    grad_norm: float | None
    learning_rate: float | None
    tokens_per_s: float | None
    peak_allocated_bytes: int | None  # CUDA: allocator; CPU: resident memory over the fork's baseline
    peak_reserved_bytes: int | None
    metrics: tuple[tuple[str, float], ...] = ()  # e.g. ("eval_loss", 1.9), ("eval_tokens", 5321.0)
    evaluation: int | None = None  # 1..num_evaluations for an evaluation, else None
    checkpoint: str | None = None
    elapsed_s: float = 0.0  # since the attempt's first training step
    temperature_c: float | None = None  # of the hottest of its GPUs; None without one
    throttle_reasons: tuple[str, ...] | None = None  # why a GPU is slowed down now; () if none is
    remaining_s: float | None = None  # predicted from the steps so far; None while these are too few
    #: Wall time of the last steps over what their processor time would make it; None on a GPU, and too early.
    slowdown: float | None = None
    contents: Contents | None = None  # of a checkpoint at a URL, where the driver cannot look

    @property
    def is_evaluation(self) -> bool:
        return self.evaluation is not None

    def metric(self, name: str) -> float | None:
        return dict(self.metrics).get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnd:
    """The last report of an attempt: it ran to the end, was stopped, or failed."""

    trial: int
    attempt: int
    completed: bool  # all steps done
    stopped: StopReason | None
    failure: FailureKind | None
    message: str  # for the user, one paragraph; empty when completed
    log_path: str | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    duration_s: float
    eval_fingerprint: str | None  # of the evaluation tokens that were really used


TrialEvent = Measurement | AttemptEnd


#: Where the rule-based configuration of a study comes from.
DEFAULT_ORIGIN = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """A trial as the database knows it."""

    number: int
    state: TrialState
    settings: TrainingSettings
    parameters: tuple[tuple[str, float | int | str], ...]  # as sampled, in Optuna's names
    origin: str  # DEFAULT_ORIGIN, "neighbour", "sampler", "enqueued", "warm start", or a preset's strategy
    plan: ExecutionPlan | None
    num_attempts: int
    value: float | None  # the study's metric; None until an evaluation
    best_step: int | None
    best_checkpoint: str | None
    failure: FailureKind | None
    message: str
    measurements: tuple[Measurement, ...]  # evaluations only, by step
    started_at: float | None  # UNIX seconds
    finished_at: float | None

    @property
    def is_default(self) -> bool:
        """Whether it is the rule-based configuration, which the gain of a search is measured against."""
        return self.origin == DEFAULT_ORIGIN
