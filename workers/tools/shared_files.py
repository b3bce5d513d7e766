"""Correct files of an exported model that transformers writes with other permissions or omits."""

from __future__ import annotations

import shutil
from pathlib import Path

from autosft.profiles.model.files import cached_file
from autosft.profiles.model.gguf import plain_folder

#: Permissions to read and write; those to execute are for folders.
_READ_AND_WRITE = 0o666


def share_as_folder(folder: Path) -> None:
    """Give files the permissions of their folder: safetensors makes its own readable for the owner only."""
    mode = folder.stat().st_mode & _READ_AND_WRITE
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def copy_tokenizer_model(folder: str | Path, *sources: str | None) -> None:
    """Copy `tokenizer.model` from the first source that has it: transformers 5 does not save it.

    Other programs need it for the order of a sentencepiece tokenizer's merges.
    """
    wanted = Path(folder) / "tokenizer.model"
    if wanted.exists():
        return
    for source in sources:
        found = None if source is None else find_tokenizer_model(source)
        if found is not None:
            shutil.copyfile(found, wanted)
            return


def find_tokenizer_model(source: str) -> Path | None:
    """Return the `tokenizer.model` of a folder, or of a hub id in the cache; None if there is none."""
    if not source:
        return None
    folder = Path(plain_folder(source, need_weights=False)).expanduser()
    if folder.is_dir():
        path = folder / "tokenizer.model"
        return path if path.is_file() else None
    return cached_file(source, "tokenizer.model")
