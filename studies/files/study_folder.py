"""A study's folder as a whole: moved or deleted with its study, without touching files of others."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles import errors
from autosft.profiles.progress_bar import progress_bar
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import MANIFEST, remove, slug

#: What autosft itself writes into a study's folder.
TRIALS, EXPORTS = "trials", "exports"
OURS = (TRIALS, EXPORTS, "artifacts", "best.yaml", "best.yaml.partial", "answers.log")


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


def outside(folder: Path | None, checkpoints: Collection[str]) -> tuple[Path, ...]:
    """Return the checkpoints on record outside the study's folder, after a run with another --output."""
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    return tuple(path for path in paths if folder is None or not path.is_relative_to(folder))


def is_our_checkpoint(path: Path, study: str) -> bool:
    """Whether a folder is a checkpoint of ours, judged by its path and manifest, without symbolic links.

    The path in a database row may be anything: somebody else may have written the row.
    """
    match path.parts:
        case (*_, owner, "trials", trial, "checkpoints", step):
            is_named_so = (
                owner == slug(study)
                and re.fullmatch(r"\d{4,}", trial) is not None
                and re.fullmatch(r"step-\d{6,}", step) is not None
            )
        case _:
            return False
    has_manifest = (path / MANIFEST).is_file() and not (path / MANIFEST).is_symlink()
    return path.is_absolute() and is_named_so and path.resolve() == path and has_manifest


def remove_files(folder: Path | None, checkpoints: Collection[str], *, study: str) -> Removed:
    """Delete autosft's files in a study's folder, then the folder unless other files remain in it.

    `checkpoints` are those on record.  Outside of the folder (`outside`), only those that are certainly
    checkpoints of this study are deleted.  Symbolic links are deleted, their targets are not.
    """
    num_bytes, kept = 0, []
    for path in outside(folder, checkpoints):
        if is_our_checkpoint(path, study):
            num_bytes += _size(path)
            remove(path)
        elif path.exists():
            kept.append(str(path))
    if folder is None:
        return Removed(num_bytes=num_bytes, left=tuple(sorted(kept)))
    for path in ours_in(folder):
        num_bytes += _size(path)
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            remove(path)
    trials = folder / TRIALS
    if trials.is_dir() and not trials.is_symlink() and not any(trials.iterdir()):
        trials.rmdir()
    left = [str(path) for path in folder.iterdir() if path != trials]
    left += [str(path) for path in trials.iterdir()] if trials.is_dir() else []
    if not left and not folder.is_symlink():
        folder.rmdir()
    return Removed(num_bytes=num_bytes, left=tuple(sorted([*kept, *left])))


def ours_in(folder: Path) -> list[Path]:
    """Return what in a study's folder autosft has written, by its name; of `trials` its numbered folders."""
    trials = folder / TRIALS
    if trials.is_symlink() or trials.is_file():
        numbered = [trials]
    else:
        numbered = [path for path in trials.glob("*") if re.fullmatch(r"(removing-)?\d{4,}", path.name)]
    return [*(path for name in OURS if name != TRIALS and os.path.lexists(path := folder / name)), *numbered]


def size_of(folder: Path | None) -> int:
    """Return the size of autosft's files in a study's folder, in bytes."""
    return 0 if folder is None else sum(_size(path) for path in ours_in(folder))


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
    name = address.rpartition("/")[2]
    with progress_bar(f"fetching {name}", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return remote.fetched(address, on_progress=show)
