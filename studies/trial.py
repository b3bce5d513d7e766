"""The values passed between asking, planning, running and telling.  Frozen, without behaviour."""

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
    """The state of a trial.  A trial is finished when it is COMPLETED, STOPPED or INFEASIBLE."""

    WAITING = "waiting"  #: asked, has no device yet
    RUNNING = "running"  #: an attempt holds a device
    PAUSED = "paused"  #: at a rung or by the user; has a checkpoint and no device
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
    """Why an attempt ended without a result.  Each kind is recorded, retried and reported differently."""

    OUT_OF_MEMORY = "out of device memory"  #: tightens the calibration; replanned smaller
    #: the same during an evaluation, where a smaller micro batch of training does not help
    EVALUATION_OUT_OF_MEMORY = "out of device memory while evaluating"
    HOST_OUT_OF_MEMORY = (
        "out of host memory"  #: killed by the kernel's OOM killer; retried with fewer trials at once
    )
    NON_FINITE_LOSS = "non-finite loss"  #: a result: the worst possible value
    #: the worker that was to run it could not be set up; ends the study, and the next run retries it
    NOT_STARTED = "could not start"
    WORKER_LOST = "worker lost"  #: killed, node gone, hung; resumed from its last checkpoint
    #: a disk, folder, model or limit outside of the trial failed; the study waits, then ends; the trial waits
    SURROUNDINGS = "surroundings"
    BAD_DATA = "bad data"  #: the data cannot be trained on; not retried
    #: the optimizer applied another rate than the schedule's, or moved a weight twice; not retried
    WRONG_STEP = "wrong optimizer step"
    STORAGE = "storage"  #: remote storage was unreachable for too long; treated like SURROUNDINGS
    DISK_FULL = "disk full"  #: no room for a checkpoint; retried once there is
    ERROR = "error"  #: an exception in training; not retried

    @property
    def is_out_of_device_memory(self) -> bool:
        return self in (FailureKind.OUT_OF_MEMORY, FailureKind.EVALUATION_OUT_OF_MEMORY)

    @property
    def is_of_surroundings(self) -> bool:
        """Whether it says nothing of the trial: the same settings would end well elsewhere, or later."""
        return self in (FailureKind.SURROUNDINGS, FailureKind.STORAGE)


class StopReason(enum.Enum):
    """Why a running attempt is told to stop."""

    PRUNED = "pruned"  #: unpromising compared with its peers at the same number of training tokens
    USER = "stopped by the user"  #: `autosft studies stop`; the trial counts as stopped
    BUDGET = "time budget over"  #: the study's time is up; counts as stopped if it has been evaluated
    TARGET = "target reached"  #: the study's target is reached, which ends it; counts as with BUDGET
    SHUTDOWN = "shutdown"  #: the driver is shutting down; the next run resumes the trial
    RUNG = (
        "paused at a rung"  #: others at this rung are better so far; keeps its last evaluation's checkpoint
    )
    PAUSED = "paused by the user"  #: `autosft studies pause`; saves a checkpoint and waits to be resumed


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Everything that changes what is learned.  Equal settings are the same experiment on every machine."""

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
    max_rounds: int | None = None  # train on the data prepared with at most this many rounds; None: uncut
    max_train_samples: int | None = None  # train on this many distinct examples, drawn by the seed; None: all

    @property
    def order(self) -> RunOrder:
        """What decides which examples are seen, and in which order."""
        return RunOrder(
            seed=self.seed, num_examples=self.num_train_examples, max_samples=self.max_train_samples
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedSettings:
    """Settings chosen once per study, for the weakest device in it; never varied by planner or retry."""

    precision: Precision
    tf32: bool
    attention: str
    eval_seq_len: int
    eval_micro_batch: int  # 0 while not known yet: the same as the micro batch of training
    eval_fingerprint: str  # sha256 over the evaluation token ids and labels
    num_evaluations: int  # evaluations of a run, evenly spaced in training tokens, the last at its end
    loss: UserCode | None = None  # a user's loss function instead of the mean over scored tokens
    trainer: UserCode | None = None  # a user's subclass of trl's SFTTrainer
    generation: Generation | None = None  # the longest prompt and answer; None without prompts
    prompts_fingerprint: str = ""  # sha256 over the prompts of the metric; "" without prompts
    padding_free: bool = False  # training micro batches are one row without padding; evaluations are padded
    packing: bool = False  # always false; written by studies from before padding_free


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """How a trial runs on the devices it is planned for; affects memory and speed, never the result.

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
    reason: str  # one sentence for the user: why this micro batch and not a larger one
    device_share: float = 1.0  # predicted share of the time that the GPU is busy; the rest is Python overhead
    run_time: RunTime | None = None  # breakdown of predicted_duration_s
    speed_correction: float = 1.0  # factor by which measured trials corrected the predicted speed
    #: Whether the attempt measures its own memory, which cannot be predicted: alone on its devices, capped at
    #: what is free there, with the largest training and evaluation batches rehearsed after the first step.
    measures_itself: bool = False
    eval_micro_batch: int | None = None  # None: as pinned; smaller if an evaluation ran out of memory

    @property
    def predicted_bytes(self) -> int | None:
        """Predicted upper bound of the memory needed on each device, in bytes; None if there is none."""
        return None if self.measures_itself else self.estimate.total_bytes

    @property
    def booked_bytes(self) -> int:
        """Memory reserved on each device, in bytes: the cap, plus what the allocator does not manage."""
        return self.memory_cap_bytes + self.estimate.outside_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScoring:
    """Prompts that are generated from at every evaluation, and whose answers are checked."""

    prompts: str  # a file of profiles.dataset.ifeval_prompts.write_prompts
    max_new_tokens: int
    incumbent: str | None = (
        None  # file of the best checkpoint's results so far, which others are raced against
    )


class Task(enum.Enum):
    """What an attempt is for."""

    TRAIN = "train"  #: train the settings
    SCORE = "score"  #: evaluate the checkpoint in `resume_from` on the examples held out for the final score
    UNTUNED = "untuned"  #: evaluate the model before tuning, on the examples that trials are compared on


#: The trial number in jobs that score the untuned model.
UNTUNED_TRIAL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialJob:
    """One attempt at a trial, complete enough to run in another process or on another machine."""

    study: str
    trial: int  # number within the study, from 0
    attempt: int  # from 1
    model: str  # folder or hub id
    data_dir: str  # prepared data (profiles.dataset.prepare): train/ and eval/ in Arrow, manifest.json
    output_dir: str  # of this trial; checkpoints are written below it
    settings: TrainingSettings
    pinned: PinnedSettings
    plan: ExecutionPlan
    device_uuids: tuple[str, ...]
    resume_from: str | None  # a checkpoint folder with resume state, or None to start from scratch
    save_resume_state: bool  # whether checkpoints carry optimizer, scheduler and RNG state
    trust_remote_code: bool
    scoring: PromptScoring | None = None
    report_to: tuple[str, ...] = ()  # transformers' names of trackers: "tensorboard", "wandb", "mlflow"
    task: Task = Task.TRAIN
    #: URL that mirrors output_dir and receives checkpoints and evaluations; None: they stay local.
    store_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint folder holds."""

    num_bytes: int
    sha256: str  # of the manifest, "" if there is none
    has_resume_state: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What an attempt reports while it runs.

    An evaluation has metrics, and a checkpoint if one was written; a progress report has no metrics.
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
    temperature_c: float | None = None  # of the hottest of its GPUs; None without a GPU
    throttle_reasons: tuple[str, ...] | None = None  # why a GPU is throttled now; empty if it is not
    remaining_s: float | None = None  # predicted from the steps so far; None while these are too few
    #: Wall time of the last steps over their expected time without other load; None on a GPU, and at first.
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
    eval_fingerprint: str | None  # of the evaluation tokens that were actually used


TrialEvent = Measurement | AttemptEnd


#: Origin of the rule-based configuration of a study.
DEFAULT_ORIGIN = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """A trial as stored in the database."""

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
        """Whether it is the rule-based configuration, which the gain of the search is measured against."""
        return self.origin == DEFAULT_ORIGIN
