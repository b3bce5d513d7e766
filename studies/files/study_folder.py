"""A study's folder as a whole: moved or deleted with its study, without touching files of others."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles import errors
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import remove, slug

#: What autosft itself writes into a study's folder.
OURS = ("trials", "artifacts", "best.yaml", "best.yaml.partial", "answers.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What deleting a study's files did."""

    num_bytes: int  # freed
    left: tuple[str, ...]  # files in its folder that autosft did not write


def folder_of(output_dir: str, name: str) -> Path | None:
    """Return a study's folder on this machine; None if there is none, or if another study uses that name."""
    folder = Path(output_dir)
    is_its_own = bool(output_dir) and folder.is_absolute() and folder.name == slug(name)
    return folder if is_its_own and folder.is_dir() else None


def remove_files(folder: Path | None, checkpoints: Collection[str]) -> Removed:
    """Delete autosft's files in a study's folder, then the folder unless other files remain in it.

    `checkpoints` are those on record; some may lie outside the folder, after a run with another --output.
    Symbolic links are deleted, their targets are not.
    """
    num_bytes = 0
    for path in (Path(checkpoint) for checkpoint in checkpoints):
        num_bytes += _size(path)
        remove(path)
    if folder is None:
        return Removed(num_bytes=num_bytes, left=())
    for path in (folder / name for name in OURS):
        num_bytes += _size(path)
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            remove(path)
    left = tuple(sorted(str(path) for path in folder.iterdir()))
    if not left and not folder.is_symlink():
        folder.rmdir()
    return Removed(num_bytes=num_bytes, left=left)


def size_of(folder: Path | None) -> int:
    """Return the size of autosft's files in a study's folder, in bytes."""
    return 0 if folder is None else sum(_size(folder / name) for name in OURS)


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk of a folder, in bytes; the folder need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(path: Path) -> int:
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())


def bring_here(store_url: str | None, output: Path) -> None:
    """Fetch the evaluations that trials on other nodes have written; if that fails, they stay missing."""
    if store_url:
        with contextlib.suppress(errors.StorageError):
            remote.mirror(store_url, output)


def fetched_with_progress(address: str) -> Path:
    """Return a checkpoint's folder on this machine; download one at a URL, with a bar in a terminal."""
    from tqdm import tqdm

    name = address.rpartition("/")[2]
    with tqdm(desc=f"fetching {name}", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return remote.fetched(address, on_progress=show)
