"""Reads the model and the data that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.dataset.prepared import PreparedData, tokens_fingerprint
from autosft.profiles.errors import UserError
from autosft.profiles.model.profile import ModelProfile, load_model_profile
from autosft.profiles.own_folders import cache_folder
from autosft.profiles.sources import has_moved
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.setup.learned import learned_so_far
from autosft.scheduler.setup.prompt_set import PromptSet
from autosft.studies.export import ExportedConfig
from autosft.studies.store.database import default_storage_url


def models_for(
    config: ExportedConfig,
    model: ModelProfile,
    data: PreparedData,
    prompts: PromptSet | None = None,
    *,
    storage: str | None = None,
) -> Models:
    """Return the models of memory and time that a study would plan with.

    They include the measurements of the studies in `storage`: a database URL, None for the database in the
    user's data folder.
    """
    return Models.of_data(
        model,
        data,
        config.pinned.num_evaluations,
        answers=None if prompts is None else prompts.answers,
        learned=learned_so_far(storage or default_storage_url()),
        cache_dir=cache_folder() / "memory",
    )


def require_trust(config: ExportedConfig, path: Path, *, trust_remote_code: bool) -> None:
    """Raise UserError for a file that names code to run, unless the user has said that it may."""
    named = [code for code in (config.pinned.loss, config.pinned.trainer) if code is not None]
    if not named or trust_remote_code:
        return
    what = " and ".join(f"{code.name} from {code.folder or 'an installed package'}" for code in named)
    raise UserError(
        f"{path} trains with {what}: that is code, and would run on this machine.",
        remedy="Read it; if you trust it, say so with --trust-remote-code.",
    )


def read_inputs(
    config: ExportedConfig, *, trust_remote_code: bool = False
) -> tuple[ModelProfile, PreparedData]:
    """Read model and data.  Raises UserError if they are not those that the configuration was found with."""
    if has_moved(config.model.name):
        raise UserError(
            f"the model of this configuration was in {config.model.name}, and is no longer there.",
            remedy="Give its new location with --model FOLDER.",
        )
    model = load_model_profile(config.model.name, trust_remote_code=trust_remote_code)
    if model.fingerprint != config.model.fingerprint:
        raise UserError(
            f"{config.model.name} is not the model that this configuration was found with "
            f"(sha256 {model.fingerprint[:12]}…, expected {config.model.fingerprint[:12]}…).",
            remedy="Point --model at the original weights.",
        )
    options: dict[str, Any] = dict(config.data.options or {})
    data = prepare(
        config.data.source,
        model=config.model.name,
        cache_dir=cache_folder() / "data",
        max_positions=model.max_positions or None,
        num_embeddings=model.vocab_size,
        trust_remote_code=trust_remote_code,
        **options,
    )
    if data.fingerprint != config.data.fingerprint and not has_same_tokens(config, data):
        raise UserError(
            f"{config.data.source} is not the data that this configuration was found with "
            f"(sha256 {data.fingerprint[:12]}…, expected {config.data.fingerprint[:12]}…).",
            remedy="Point --data at the original data; it has to give the same tokens, "
            "which other versions of the tokenizer's libraries can change.",
        )
    return model, data


def has_same_tokens(config: ExportedConfig, data: PreparedData) -> bool:
    """Whether data with another fingerprint, for example from other library versions, has the same tokens."""
    wanted = config.data.tokens_fingerprint
    return bool(wanted) and tokens_fingerprint(data, config.settings.max_rounds) == wanted
