"""Files of an exported model that transformers writes otherwise than the folder they are in."""

from __future__ import annotations

import shutil
from pathlib import Path

from autosft.profiles.model.files import cached_file
from autosft.profiles.model.gguf import plain_folder

#: Rights to read and write; those to run a file are for folders.
_READ_AND_WRITE = 0o666


def share_as_folder(folder: Path) -> None:
    """Let whoever may read a folder read its files: safetensors writes its own for the owner alone."""
    mode = folder.stat().st_mode & _READ_AND_WRITE
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def copy_tokenizer_model(folder: str | Path, *sources: str | None) -> None:
    """Copy `tokenizer.model` of the first source that has it: transformers 5 does not write it again.

    It is what other programs know the order of a sentencepiece tokenizer's merges from.
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
    """Return the `tokenizer.model` of a folder, or of a hub id in the cache; None without one."""
    if not source:
        return None
    folder = Path(plain_folder(source, need_weights=False)).expanduser()
    if folder.is_dir():
        path = folder / "tokenizer.model"
        return path if path.is_file() else None
    return cached_file(source, "tokenizer.model")
