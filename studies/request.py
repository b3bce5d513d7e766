"""What a user requests, validated: the same fields on the command line and in a YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from autosft.profiles.dataset.split import parse_fold
from autosft.profiles.dataset.template_date import parse_date
from autosft.profiles.errors import UserError
from autosft.profiles.memory_ways import require_way
from autosft.profiles.model.adapters import chosen, unused_settings
from autosft.studies.metrics import (
    IFEVAL_BENCHMARK,
    METRICS,
    Evidence,
    current_name,
    find_metric,
    token_metrics,
)
from autosft.studies.quantities import parse_duration, parse_size
from autosft.studies.search.dimensions import Dimension
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.presets import preset, presets
from autosft.studies.search.settings import SETTINGS
from autosft.studies.yaml_file import read_yaml

_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/+")


class TuneRequest(BaseModel):
    """What the user requests of a study.  Field descriptions are the help texts of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    model: str | None = Field(None, description="Model folder or hub id; if omitted, the built-in demo runs.")
    data: str | None = Field(
        None,
        description="Training data: file, folder or hub id, or several with weights: a.jsonl:2,b.csv.",
    )
    eval_data: str | None = Field(
        None, description="Evaluation data; if omitted, some of --data is held out."
    )
    preset: str | None = Field(
        None,
        description="Try the strategies of a preset first: "
        + "; ".join(f"{preset.name} ({preset.summary})" for preset in presets().values())
        + ". Flags and --config override what it sets.",
    )
    hardware: str = Field(
        "auto",
        description="auto, cpu (2xcpu: as two devices), the name of a known device, or a saved profile.",
    )
    gpus: str | None = Field(None, description="GPUs to use, by index: 2,3; by UUID on any node.")
    num_gpus: int | None = Field(
        None, description="Number of GPUs to use: those with the most free memory.", ge=1
    )
    max_gpus_per_trial: int | None = Field(
        None, description="Maximum number of GPUs for a single trial, if it does not fit on one.", ge=1
    )
    study: str | None = Field(
        None, description="Name of the study; an existing study is resumed.", min_length=1, max_length=200
    )
    storage: str | None = Field(
        None, description="Database URL; defaults to a SQLite file in your data folder."
    )
    output: str | None = Field(
        None,
        description="Folder for checkpoints and best.yaml, or a URL for checkpoints: s3://bucket/studies.",
    )
    trials: int | None = Field(None, description="Number of trials to finish.", ge=1, le=100_000)
    budget_runs: float | None = Field(
        None,
        description="Limit of the study in training tokens, as a number of full runs: 20, 7.5.",
        gt=0,
        le=100_000,
    )
    time_budget: float | None = Field(None, description="Time limit of the study: 3h, 45m.")
    metric: str = Field(
        "eval_loss",
        description="Metric that trials are compared by: "
        + "; ".join(f"{metric.name}, the {metric.summary}" for metric in METRICS.values())
        + ".",
    )
    target: str | None = Field(
        None,
        description="End the study once the entire 95 % interval of a checkpoint passes this: eval_loss=1.2.",
    )
    final_metric: str | None = Field(
        None,
        description="A second metric for the best checkpoints, on examples not used to choose them.",
    )
    ifeval_data: str = Field(
        IFEVAL_BENCHMARK.hub_name,
        description="Prompts of --metric ifeval: hub id or local JSON file.",
        min_length=1,
    )
    ifeval_new_tokens: int = Field(
        IFEVAL_BENCHMARK.max_new_tokens,
        description="Maximum length of an answer to an IFEval prompt, in tokens.",
        ge=1,
    )
    method: Literal["auto", "full", "lora", "qlora", "sparse"] = Field(
        "auto",
        description="What is trained. auto: full if it fits, else LoRA; sparse: full, zeros stay zero.",
    )
    adapter: str = Field(
        "lora",
        description="Adapter that --method lora trains: lora, dora, rslora, ia3 or another of peft's, with "
        "options after commas: prefix_tuning,num_virtual_tokens=20.",
    )
    merge_adapter: bool = Field(
        False, description="If --model is the folder of an adapter, merge it into its base model first."
    )
    loss: str | None = Field(
        None, description="Custom loss: package.module:function of (outputs, labels, num_items_in_batch)."
    )
    trainer: str | None = Field(
        None, description="Custom trainer: package.module:Class, a subclass of SFTTrainer."
    )
    epochs: float = Field(3.0, description="Passes over the training data in a full run.", gt=0)
    max_train_samples: int | None = Field(
        None, description="Maximum number of training examples to use.", ge=1
    )
    evaluations: int = Field(
        4, description="Number of evaluations in a run, at which trials may be stopped early.", ge=1, le=50
    )
    prune: bool = Field(True, description="Stop unpromising trials early.")
    rungs: Literal["freeze-thaw", "stop", "pause"] = Field(
        "freeze-thaw",
        description="What happens at an evaluation. freeze-thaw: a model of the learning curves decides "
        "whether to go on with this trial, with a paused one, or to try new settings; stop: a trial in the "
        "worse half ends; pause: it waits until it is promoted.",
    )
    block_size: int | None = Field(None, description="Pack plain text into blocks of this many tokens.", ge=8)
    fold: str | None = Field(None, description="Compare trials on part of the data: 2/5, the second of five.")
    template_date: str | None = Field(
        None,
        description="Date for chat templates that contain today's date: 2026-11-30; default: the "
        "day on which the study is created.",
    )
    skip_bad_records: bool = Field(False, description="Skip and count bad records instead of stopping.")
    precision: Literal[
        "auto", "fp32", "bf16-autocast", "fp16-autocast", "bf16", "bf16-stochastic", "fp16"
    ] = Field("auto", description="Precision of training; the same for the whole study.")
    memory: Literal["exact", "lean", "leanest", "auto"] = Field(
        "exact",
        description="How full fine-tuning holds weights and moments: exact; lean, bf16 weights rounded "
        "stochastically and 8-bit moments; leanest, 4-bit moments; auto, the first of them that fits.",
    )
    padding_free: bool = Field(
        False,
        description="Concatenate the examples of a micro batch into one row, without padding: the same "
        "losses up to rounding, with fewer tokens to compute and store.",
    )
    allow_degrade: bool = Field(
        False,
        description="If a trial does not fit otherwise, let it use a shorter length, a smaller effective "
        "batch or an 8-bit optimizer; recorded with the trial.",
    )
    max_concurrent: int | None = Field(None, description="Maximum number of trials that run at once.", ge=1)
    export: Literal["gguf"] | None = Field(
        None,
        description="Export the best trial for llama.cpp and Ollama into the study's folder; whether the "
        "model can be exported is checked before training.",
    )
    warm_start: str = Field(
        "auto",
        description="Try the best settings of an earlier study first: auto (a similar one), none, or a name.",
        min_length=1,
    )
    keep_best: int = Field(3, description="Number of checkpoints to keep for the whole study.", ge=1)
    disk_budget: int | None = Field(
        None, description="Disk space for the checkpoints of the study: 20GB, 500MiB.", ge=1
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a model from the hub.")
    seed: int = Field(0, description="Seed of the sampler and of every trial.", ge=0, lt=2**31)
    address: str | None = Field(
        None, description="Address of a running Ray cluster; if omitted, a local cluster is started."
    )
    notify: str | None = Field(
        None, description="URL or command to notify of a new best trial, a failure, and the end."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="Experiment trackers to report every trial to: tensorboard, wandb, mlflow."
    )
    space: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings to fix or search: learning_rate: 1e-5..1e-3 log, lora_rank: [8, 16].",
    )

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, given: str) -> str:
        return find_metric(given).name

    @field_validator("final_metric")
    @classmethod
    def _known_final_metric(cls, given: str | None) -> str | None:
        if given is None:
            return None
        metric = find_metric(given, flag="--final-metric")
        if metric.evidence is not Evidence.TOKENS:
            raise UserError(
                f"--final-metric {given}: not computed from the evaluation examples.",
                remedy=f"One of: {', '.join(metric.name for metric in token_metrics())}.",
            )
        return metric.name

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, given: str | None) -> str | None:
        return None if given is None else preset(given).name

    @model_validator(mode="after")
    def _adapter_of_the_method(self) -> TuneRequest:
        kind = chosen(self.adapter)["kind"]
        if self.adapter != "lora" and self.method not in ("lora", "qlora"):
            raise UserError(
                f"--adapter {self.adapter} goes with --method lora, not {self.method}.",
                remedy="Add --method lora.",
            )
        if self.method == "qlora" and kind != "lora":
            raise UserError(
                f"--adapter {self.adapter}: over 4-bit weights, only LoRA's variants can be predicted.",
                remedy="Use --method lora, or --adapter lora, dora or rslora.",
            )
        if given := [name for name in unused_settings(self.adapter) if name in self.space]:
            raise UserError(
                f"--adapter {self.adapter} has no {given[0]}.",
                remedy=f"Remove --{given[0].replace('_', '-')}.",
            )
        return self

    @model_validator(mode="after")
    def _memory_of_the_method(self) -> TuneRequest:
        require_way(self.memory, self.method, self.precision, has_optimizer="optimizer" in self.space)
        return self

    @model_validator(mode="after")
    def _target_of_the_metric(self) -> TuneRequest:
        self.target_value()
        return self

    @field_validator("fold")
    @classmethod
    def _known_fold(cls, given: str | None) -> str | None:
        return None if given is None else str(parse_fold(given))

    @field_validator("template_date", mode="before")
    @classmethod
    def _date(cls, given: object) -> object:
        return None if given is None else parse_date(str(given))  # YAML reads 2026-11-30 as a date

    @field_validator("time_budget", mode="before")
    @classmethod
    def _seconds(cls, given: object) -> object:
        return parse_duration(given) if isinstance(given, str | int | float) else given

    @field_validator("output", mode="before")
    @classmethod
    def _folder(cls, given: object) -> object:
        if given is None:
            return None
        found = _SCHEME.match(str(given))  # a path joins the slashes of a URL to one
        if found is None:
            return str(given)
        rest = str(given)[found.end() :].rstrip("/")
        if found["scheme"] == "file":
            return f"/{rest}"
        if "@" in rest.partition("/")[0]:
            raise UserError(
                "--output: a URL that contains a password would be stored with the study.",
                remedy="Remove it; fsspec reads credentials from the environment or configuration files.",
            )
        return f"{found['scheme']}://{rest}"

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        return tuple(part.strip() for part in given.split(",") if part.strip())

    @field_validator("disk_budget", mode="before")
    @classmethod
    def _bytes(cls, given: object) -> object:
        return parse_size(given) if isinstance(given, str) else given

    @field_validator("gpus", "data", "eval_data", mode="before")
    @classmethod
    def _list_or_text(cls, given: object) -> object:
        return ",".join(str(each) for each in given) if isinstance(given, list) else given

    @field_validator("space")
    @classmethod
    def _known_settings(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            parse_dimension(name, value)
        return given

    @model_validator(mode="after")
    def _model_and_data_together(self) -> TuneRequest:
        if (self.model is None) != (self.data is None):
            missing = "data" if self.data is None else "model"
            raise UserError(
                f"--{missing} is missing.", remedy="Give --model and --data, or neither to run the demo."
            )
        return self

    def target_value(self) -> float | None:
        """Return the value at which the study ends, None if there is none.  Raises UserError."""
        if self.target is None:
            return None
        name, _, value = self.target.partition("=")
        if current_name(name.strip()) != self.metric:
            raise UserError(
                f"--target {self.target}: the study compares trials by {self.metric}.",
                remedy=f"Write --target {self.metric}=VALUE, or add --metric {name.strip()}.",
            )
        try:
            return float(value)
        except ValueError:
            raise UserError(
                f"--target {self.target}: {value!r} is not a number.",
                remedy=f"For example {self.metric}=0.25.",
            ) from None

    def dimensions(self) -> dict[str, Dimension]:
        """Return the dimensions of the settings that the user fixed or gave a range."""
        return {name: parse_dimension(name, value) for name, value in self.space.items()}


def read_request(flags: Mapping[str, Any], config: Path | None) -> TuneRequest:
    """Build a request from a preset, a YAML file and flags; each overrides the ones before it.

    `flags` holds only what the user gave.  In the file, a searched setting (learning_rate, …) may be given at
    the top level or under `space`.  Raises UserError with the nearest known name for an unknown key, and with
    file and line for broken YAML.
    """
    fields = {} if config is None else read_config(config)
    space = {**fields.pop("space", {}), **flags.get("space", {})}
    if name := flags.get("preset", fields.get("preset")):
        given = split_searched(preset(str(name)).request)
        space = {**given.pop("space"), **space}
        fields = {**given, **fields}
    merged = {**fields, **{name: value for name, value in flags.items() if name != "space"}, "space": space}
    try:
        return TuneRequest(**merged)
    except pydantic.ValidationError as error:
        raise as_user_error(error, config) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file with the fields of a TuneRequest.  Raises UserError."""
    content = read_yaml(path, text_keys=_TEXT_FIELDS)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found a {type(content).__name__}.")
    fields = {str(name).replace("-", "_"): value for name, value in content.items()}
    space = fields.get("space") or {}
    if not isinstance(space, dict):
        raise UserError(f"{path}: space has to be a mapping of settings to values, not {space!r}.")
    known = [*TuneRequest.model_fields, *SETTINGS]
    for name in fields:
        if name not in known:
            [nearest, *_] = [*difflib.get_close_matches(name, known, n=1), ""]
            raise UserError(
                f"{path}: unknown key {name!r}.",
                remedy=f"Did you mean {nearest!r}?"
                if nearest
                else f"Known keys: {', '.join(sorted(known))}.",
            )
    return split_searched(fields)


def split_searched(given: Mapping[str, Any]) -> dict[str, Any]:
    """Move the searched settings among a request's fields to `space`."""
    fields = dict(given)
    # `method: lora` sets the request's own field; the other settings belong to the space
    moved = {name: fields.pop(name) for name in list(fields) if name in SETTINGS and name != "method"}
    fields["space"] = {**moved, **(fields.get("space") or {})}
    return fields


def as_user_error(error: pydantic.ValidationError, config: Path | None) -> UserError:
    """Return pydantic's first error as a UserError with value and bound."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    name = ".".join(str(part) for part in first["loc"])
    where = f" (flag or {config})" if config else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"--{name.replace('_', '-')}{where}: {first['input']!r}: {message}.")


#: Fields that are text even if the value looks like a number: `gpus: 0`, `study: 2026-11-30`.
_TEXT_FIELDS = frozenset(
    {
        name
        for name, field in TuneRequest.model_fields.items()
        if str in (field.annotation, *get_args(field.annotation))
    }
    | {"time_budget", "disk_budget"}
)
