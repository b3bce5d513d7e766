"""Load a model's tokenizer for preparing data, as late as possible, and identify it by its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.hub import looks_like_path
from autosft.profiles.dataset.sources import files_fingerprint
from autosft.profiles.dataset.template_date import (
    date_in_files,
    files_write_date,
    recorded_date,
    writes_date,
)
from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.errors import UserError
from autosft.profiles.model.gguf import tokenizer_home

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "additional_chat_templates/*",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokenizer:
    """A model's tokenizer; loaded at once only if it has no local files that identify it."""

    model: str
    trust_remote_code: bool
    files: tuple[Path, ...]  # of a local folder
    loaded: Any  # None if there are files
    notes: list[str]  # what loading reports to the user

    def load(self) -> Any:
        """Return the tokenizer; its remarks go to `notes`."""
        return self.loaded or _load_tokenizer(self.model, self.trust_remote_code, self.notes)

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of the tokenizer's files, or of the loaded tokenizer."""
        return files_fingerprint(self.files) if self.files else _tokenizer_fingerprint(self.loaded)

    def writes_date(self) -> bool:
        """Return whether its chat template writes today's date."""
        return files_write_date(self.files) if self.files else writes_date(self.loaded.chat_template)

    def trained_date(self) -> str | None:
        """Return the date that the model was trained with, None if its tokenizer does not record one."""
        return date_in_files(self.files) if self.files else recorded_date(self.loaded)


def tokenizer_of(model: str, *, trust_remote_code: bool) -> ModelTokenizer:
    """Return the tokenizer of a model folder or hub id.

    Raises UserError if there is none, or if its tokens cannot be mapped to characters.
    """
    files = _tokenizer_files(tokenizer_home(model))
    notes: list[str] = []
    return ModelTokenizer(
        model=model,
        trust_remote_code=trust_remote_code,
        files=files,
        loaded=None if files else _load_tokenizer(model, trust_remote_code, notes),
        notes=notes,
    )


def _tokenizer_files(model: str) -> tuple[Path, ...]:
    """Return the files that make up the tokenizer of a local model folder; none for a hub id."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or looks_like_path(model):
            raise UserError(f"{model} is not a model folder.")
        return ()
    files = tuple(sorted(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)))
    if not files:
        raise UserError(
            f"{model} holds no tokenizer.",
            remedy="Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder.",
        )
    return files


def _load_tokenizer(model: str, trust_remote_code: bool, notes: list[str]) -> Any:
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, say=notes.append)
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {model} has no tokenizer.json, which is needed to map tokens to their "
            "places in the text.",
            remedy="Convert it with transformers.convert_slow_tokenizer and save it into the folder.",
        )
    return tokenizer


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
