"""Check whether padding-free training of a model is equivalent to training with padding."""

from __future__ import annotations

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import KINDS
from autosft.profiles.model.profile import ModelProfile


def require_padding_free(
    model: ModelProfile, *, adapter: str = "lora", longest: int, has_own_code: bool = False
) -> None:
    """Raise UserError if `--padding-free` would not train the same as padded batches do.

    `adapter` is a kind of `profiles.model.adapters.KINDS`, `longest` the truncation length of examples, and
    `has_own_code` whether loss or trainer are a user's.  Layers that mix the examples of a row other than by
    attention are found when the step is traced (`memory.trace.trainer_step`).
    """
    reason = _why_not(model, adapter, longest, has_own_code=has_own_code)
    if reason:
        raise UserError(f"--padding-free: {reason}.", remedy="Leave it out to train with padding.")


def _why_not(model: ModelProfile, adapter: str, longest: int, *, has_own_code: bool) -> str:
    if has_own_code:
        return "--loss and --trainer expect one row per example"
    if KINDS[adapter].is_prompt:
        return f"--adapter {adapter} puts its prompt before the first example of a row only"
    if model.attention != "sdpa":
        return f"{model.architecture} has {model.attention} attention only, which needs a mask of the row"
    window = attention_window(model)
    if window is not None and longest > window:
        return f"of examples of up to {longest} tokens {model.architecture} sees {window} at a time"
    return ""


def attention_window(model: ModelProfile) -> int | None:
    """Return the shortest attention window of any layer in tokens; None where attention is unlimited."""
    from autosft.profiles.memory.trace.shallow_model import shallow_model

    return shallow_model(model.config_json, trust_remote_code=model.trust_remote_code).window
