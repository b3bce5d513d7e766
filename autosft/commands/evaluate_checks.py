"""What `autosft evaluate` is asked for, and that all of it can be scored, before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    from autosft.profiles.dataset.prepared import PreparedData
    from autosft.scheduler.finish.given_models import GivenModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The flags of the command."""

    metrics: tuple[str, ...]
    data: str | None
    seq_len: int | None
    ifeval_data: str
    ifeval_new_tokens: int
    limit: int | None
    batch_size: int
    task_folder: Path | None
    template_date: str | None  # what all of them are asked with, where a template writes today's
    race: bool
    trust_remote_code: bool
    again: bool = False  # whether what an earlier run has scored is scored again

    @property
    def text(self) -> Path | None:
        """--data where it is running text, which is scored by a sliding window."""
        path = None if self.data is None else Path(self.data).expanduser()
        return path if path is not None and path.suffix == ".txt" and path.is_file() else None

    @property
    def wants_tokens(self) -> bool:
        """Whether a metric is of scored tokens, for which data is needed."""
        from autosft.studies.metrics import METRICS, Evidence

        return any(name in METRICS and METRICS[name].evidence is Evidence.TOKENS for name in self.metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Data that a study kept for the final score, and how it was prepared."""

    of: str  # the study's name
    source: str
    options: dict[str, Any]
    seq_len: int
    trust_remote_code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that has been checked, with the data that it is scored on."""

    model: GivenModel
    folder: str  # what is loaded: a folder of this machine, or a hub id
    trust_remote_code: bool
    data: PreparedData | None = None  # None: no metric needs it, or it is running text
    is_held_out: bool = False  # whether only the examples for the final score count
    seq_len: int | None = None

    @property
    def name(self) -> str:
        """What stands in the first column: as typed, and of a checkpoint that is known which it is."""
        record = self.model.record
        if record is None:
            return self.model.given
        return f"{self.model.given} (trial {record.trial} step {record.step})"


def check_all(models: Sequence[GivenModel], asked: Asked) -> list[Ready]:
    """Return all models ready to be scored.  Raises UserError for the first that cannot be, and why."""
    check_metrics(asked)
    if asked.wants_tokens and asked.data is None:
        shared = next(filter(None, (held_out_of(model) for model in models)), None)
        for model in models:
            if held_out_of(model) is None and shared is None:
                raise UserError(
                    f"{model.given} belongs to no study in the database, so there is no data to score it on.",
                    remedy="Give --data, name a study beside it, or --storage with the study's database.",
                )
    else:
        shared = None
    return [check(model, asked, shared=shared) for model in models]


def check_metrics(asked: Asked) -> None:
    """Raise UserError for a metric that is a function which is not there."""
    from autosft.profiles.user_code import import_user_module

    for name in asked.metrics:
        if not name.startswith("python:"):
            continue
        module_name, dot, attribute = name.removeprefix("python:").rpartition(".")
        what = f"--metric {name}"
        remedy = "Write it as python:package.module.function, importable from this folder."
        if not dot:
            raise UserError(f"{what} names no module.", remedy=remedy)
        if not callable(getattr(import_user_module(module_name, Path.cwd(), what=what), attribute, None)):
            raise UserError(f"{what}: {module_name} has no function {attribute}.", remedy=remedy)


def check(model: GivenModel, asked: Asked, *, shared: HeldOut | None) -> Ready:
    """Fetch a model if need be, look at it without loading weights, and prepare its data."""
    from autosft.profiles.model.profile import load_model_profile
    from autosft.profiles.sources import require_base_of_adapter
    from autosft.studies.files.checkpoints import verify_if_sealed
    from autosft.studies.files.study_folder import fetched_with_progress

    trust = asked.trust_remote_code or (model.study is not None and model.study.spec.trust_remote_code)
    folder = str(fetched_with_progress(model.source))
    verify_if_sealed(Path(folder))
    require_base_of_adapter(Path(folder))
    base = reader_of(folder)
    profile = load_model_profile(base, trust_remote_code=trust)
    ready = Ready(model=model, folder=folder, trust_remote_code=trust)
    if not asked.wants_tokens or asked.text is not None:
        return ready
    options: dict[str, Any] = {"trust_remote_code": trust}
    seq_len, is_held_out = asked.seq_len, asked.data is None
    if asked.data is not None:
        source = asked.data
        options["template_date"] = asked.template_date
    else:
        held_out = held_out_of(model) or shared
        assert held_out is not None, "checked before"
        source, seq_len = held_out.source, asked.seq_len or held_out.seq_len
        options = {**held_out.options, "trust_remote_code": trust or held_out.trust_remote_code}
    data = prepared(source, model=base, profile=profile, options=options)
    if is_held_out and data.final.num_examples == 0:
        raise UserError(
            f"{model.given}: its study kept no examples for the final score.", remedy="Give --data."
        )
    return Ready(
        model=model,
        folder=folder,
        trust_remote_code=trust,
        data=data,
        is_held_out=is_held_out,
        seq_len=seq_len,
    )


def prepared(source: str, *, model: str, profile: Any, options: dict[str, Any]) -> PreparedData:
    """Prepare data as `model` reads it, or find it in the cache."""
    from autosft.profiles.dataset import prepare
    from autosft.profiles.own_folders import cache_folder

    return prepare(
        source,
        model=model,
        cache_dir=cache_folder() / "data",
        max_positions=profile.max_positions or None,
        num_embeddings=profile.vocab_size,
        **options,
    )


def held_out_of(model: GivenModel) -> HeldOut | None:
    """Return the data that a model's study kept for the final score; None where no study is known."""
    if model.study is not None:
        spec = model.study.spec
        return HeldOut(
            of=spec.name,
            source=spec.data,
            options=dict(spec.data_options or {}),
            seq_len=spec.pinned.eval_seq_len,
            trust_remote_code=spec.trust_remote_code,
        )
    if model.config is not None:
        config = model.config
        return HeldOut(
            of=config.study,
            source=config.data.source,
            options=dict(config.data.options or {}),
            seq_len=config.pinned.eval_seq_len,
            trust_remote_code=False,
        )
    return None


def reader_of(folder: str) -> str:
    """Return the model that reads data for `folder`: the base of an adapter, else the folder itself."""
    from autosft.profiles.model.adapter_folder import base_of

    return base_of(folder) or folder


def date_for(folders: Sequence[str], given: str | None) -> str | None:
    """Return the date that all models are asked with: as given, or the first one trained with one's.

    Only chat templates that write today's date take it; None is today.
    """
    from autosft.profiles.dataset.template_date import date_in_files, parse_date

    if given is not None:
        return parse_date(given)
    dates = (date_in_files([Path(folder) / "tokenizer_config.json"]) for folder in folders)
    return next(filter(None, dates), None)
