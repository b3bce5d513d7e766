"""Folders at a URL (s3://, gs://, …: anything fsspec supports), each complete or absent.

A folder is uploaded file by file, and its manifest, which lists the files with their hashes, last; it is
deleted manifest first.  So a folder with a manifest is complete, whatever was killed, and one without is
garbage, which `sweep` collects.  Failed operations are retried for about a minute; then StorageError is
raised.

Limits: a single stream of PART_BYTES at a time through fsspec's generic interface, so that a trial under a
memory cap can use it.  Parts that a killed multi-part upload leaves are for the bucket's own rules to delete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from autosft.profiles.errors import StorageError, UserError
from autosft.profiles.own_folders import cache_folder
from autosft.studies.files.checkpoints import MANIFEST, manifest_of
from autosft.studies.files.storage import (
    describe_error,
    open_storage,
    package_of,
    storage_errors,
    with_retries,
)

T = TypeVar("T")
Progress = Callable[[int, int], object]  # (bytes done, total bytes)

#: Size of reads and of upload parts; S3 permits at most 10,000 parts a file.
PART_BYTES = 32 << 20
#: Number of fetched checkpoints that stay in this machine's cache.
NUM_CACHED = 4

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://")


def is_url(address: str) -> bool:
    """Whether an address is a URL rather than a local folder."""
    return _URL.match(address) is not None


# --- uploading ------------------------------------------------------------------------------------


def probe(url: str) -> None:
    """Write, read and delete a small object at a URL.  Raises UserError that says what failed."""
    name = f".autosft-probe-{secrets.token_hex(4)}"
    try:
        fs, root = open_storage(url)
        path = f"{root}/{name}"
        _in_folder(fs, root, partial(fs.pipe_file, path, name.encode()))
        if fs.cat_file(path) != name.encode():
            raise OSError("the object was read back with other content")
        fs.rm_file(path)
    except ImportError as error:
        package = package_of(url)
        raise UserError(
            f"--output {url}: {package} is needed for {url.partition(':')[0]} storage and is not installed.",
            remedy=f"pip install {package}, on every node.",
        ) from error
    except Exception as error:  # each library has its own exceptions for credentials, buckets and networks
        raise UserError(
            f"--output {url}: a small object could not be written, read and deleted there: "
            f"{describe_error(error)}",
            remedy=f"Check that the bucket exists, and that the credentials and the endpoint that "
            f"{package_of(url)} finds in the environment of every node may write to it.",
        ) from error


def upload(
    folder: Path, url: str, *, marker: str = MANIFEST, on_progress: Callable[[], object] = lambda: None
) -> None:
    """Upload a folder to a URL; its manifest, stored there as `marker`, comes last and marks it as complete.

    Calls `on_progress` after each part.  Raises StorageError.
    """
    sealed = folder / MANIFEST
    manifest = (
        sealed.read_text() if marker == MANIFEST and sealed.is_file() else manifest_of(folder, name=marker)
    )
    fs, root = open_storage(url)
    with storage_errors(f"{folder} could not be uploaded to {url}"):
        for name in json.loads(manifest)["files"]:
            with_retries(partial(_send, fs, folder / name, f"{root}/{name}", on_progress))
        with_retries(lambda: fs.pipe_file(f"{root}/{marker}", manifest.encode()))


def _send(fs: Any, source: Path, target: str, on_progress: Callable[[], object]) -> None:
    opened = partial(fs.open, target, "wb", block_size=PART_BYTES)
    with source.open("rb") as file, _in_folder(fs, posixpath.dirname(target), opened) as out:
        while part := file.read(PART_BYTES):
            out.write(part)
            on_progress()
    if fs.size(target) != source.stat().st_size:
        raise OSError(f"{target} has another size than the file that was uploaded")


def _in_folder(fs: Any, folder: str, write: Callable[[], T]) -> T:
    """Write something, creating its folder on file systems that have folders; buckets are never created."""
    try:
        return write()
    except FileNotFoundError:
        whole = PurePosixPath(folder)
        for ancestor in [*reversed(whole.parents), whole]:
            if len(ancestor.parts) < 2:  # the bucket, or the root
                continue
            with contextlib.suppress(FileExistsError, NotImplementedError):
                fs.mkdir(str(ancestor), create_parents=False)
        return write()


def put_file(path: Path, url: str) -> None:
    """Upload a small file.  Raises StorageError."""
    fs, target = open_storage(url)
    with storage_errors(f"{path} could not be uploaded to {url}"):
        with_retries(lambda: _send(fs, path, target, lambda: None))


# --- fetching -------------------------------------------------------------------------------------


def exists(url: str, *, marker: str = MANIFEST) -> bool:
    """Whether a complete folder is at a URL.  Raises StorageError."""
    fs, root = open_storage(url)
    with storage_errors(f"{url} could not be looked at"):
        return bool(with_retries(lambda: fs.exists(f"{root}/{marker}")))


def download(
    url: str,
    folder: Path,
    *,
    marker: str = MANIFEST,
    on_progress: Progress | None = None,
) -> None:
    """Download a folder, verified against the hashes in its manifest, completely or not at all.

    Calls `on_progress` with (bytes done, total bytes).  Raises StorageError, and UserError if the contents
    are not what was written.
    """
    fs, root = open_storage(url)
    staged = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    staged.mkdir(parents=True)
    try:
        with storage_errors(f"{url} could not be fetched"):
            manifest = with_retries(lambda: fs.cat_file(f"{root}/{marker}"))
            files = _files_of(manifest, url)
            total, done = sum(num_bytes for num_bytes, _ in files.values()), 0
            for name, (num_bytes, sha256) in files.items():
                target = staged / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source, callback = f"{root}/{name}", _counting(on_progress, done, total)
                with_retries(partial(fs.get_file, source, str(target), callback=callback))
                if target.stat().st_size != num_bytes or _sha256(target) != sha256:
                    raise UserError(
                        f"{url}/{name} is corrupt: its sha256 differs from the manifest's.",
                        remedy="Use another checkpoint, or train it again.",
                    )
                done += num_bytes
        (staged / marker).write_bytes(manifest)
        shutil.rmtree(folder, ignore_errors=True)
        staged.replace(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def fetched(
    address: str,
    *,
    cache: Path | None = None,
    marker: str = MANIFEST,
    on_progress: Progress | None = None,
) -> Path:
    """Return a local folder with the contents at an address, downloading those at a URL once.

    In the user's cache, used if `cache` is not given, the NUM_CACHED most recently used folders stay; in a
    given `cache`, all of them.
    """
    if not is_url(address):
        return Path(address)
    from filelock import FileLock

    root = cache or cache_folder() / "checkpoints"
    slot = root / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = slot / posixpath.basename(address)
    slot.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{slot.name}.lock"):
        if not (folder / marker).is_file():
            download(address, folder, marker=marker, on_progress=on_progress)
        os.utime(slot)
    if cache is None:
        slots = sorted(
            (path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime
        )
        for old in slots[:-NUM_CACHED]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def get_file(url: str, path: Path) -> bool:
    """Download a small file; return False if it does not exist.  Raises StorageError."""
    fs, source = open_storage(url)
    with storage_errors(f"{url} could not be fetched"):
        try:
            content = with_retries(lambda: fs.cat_file(source))
        except FileNotFoundError:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return True


def mirror(url: str, folder: Path) -> None:
    """Download the per-example measurements of a study's trials that are missing on this machine.

    These are small files that workers on other nodes have written.  Raises StorageError.
    """
    fs, root = open_storage(url)
    with storage_errors(f"{url} could not be looked at"):
        names = [name for name in _find(fs, root, "trials") if name.split("/")[2] in ("evaluations", "final")]
    missing = [name for name in names if not (folder / name).is_file()]
    with ThreadPoolExecutor(8) as several:
        list(several.map(lambda name: get_file(f"{url}/{name}", folder / name), missing))


# --- deleting -------------------------------------------------------------------------------------


def remove(url: str) -> None:
    """Delete a folder at a URL; if interrupted, the rest has no manifest.  Raises StorageError."""
    fs, root = open_storage(url)
    with storage_errors(f"{url} could not be deleted"):
        for name in (f"{root}/{MANIFEST}", root):
            with contextlib.suppress(FileNotFoundError):
                fs.rm(name, recursive=name == root)


def discard(urls: Iterable[str]) -> None:
    """Delete folders that nothing refers to any more, in the background.

    `settle` waits for it; what is left over is swept when the study next starts.
    """
    doomed = list(urls)

    def act() -> None:
        with contextlib.suppress(StorageError):
            for url in doomed:
                remove(url)

    if doomed:
        _discarding[:] = [thread for thread in _discarding if thread.is_alive()]
        _discarding.append(threading.Thread(target=act, name="discard", daemon=True))
        _discarding[-1].start()


_discarding: list[threading.Thread] = []


def settle(timeout_s: float = 60.0) -> None:
    """Wait for background deletions, at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    for thread in _discarding:
        thread.join(max(0.0, deadline - time.monotonic()))


def sweep(url: str, *, known: Collection[str], running: Collection[int]) -> None:
    """Delete incomplete checkpoints that killed processes left at a study's URL, if it can be reached."""
    with contextlib.suppress(StorageError):
        discard(list(strays(url, known=known, running=running)))


def remove_study(url: str) -> None:
    """Delete everything at a study's URL.  Raises StorageError."""
    fs, root = open_storage(url)
    with storage_errors(f"{url} could not be deleted"), contextlib.suppress(FileNotFoundError):
        fs.rm(root, recursive=True)


def strays(url: str, *, known: Collection[str], running: Collection[int]) -> Iterator[str]:
    """Yield checkpoints of a study at a URL that have no record: half-uploaded, or never reported.

    Checkpoints of `running` trials are skipped.  Raises StorageError.
    """
    fs, root = open_storage(url)
    with storage_errors(f"{url} could not be looked at"):
        names = _find(fs, root, "trials")
    folders = {"/".join(name.split("/")[:4]) for name in names if name.split("/")[2] == "checkpoints"}
    for folder in sorted(folders):
        if f"{url}/{folder}" not in known and int(folder.split("/")[1]) not in running:
            yield f"{url}/{folder}"


def _find(fs: Any, root: str, below: str) -> list[str]:
    """Return all files at least two levels below a folder, relative to `root`."""
    fs.invalidate_cache()
    try:
        found = with_retries(lambda: fs.find(f"{root}/{below}"))
    except FileNotFoundError:
        return []
    names = [path[len(root) :].strip("/") for path in found]
    return sorted(name for name in names if name.count("/") >= 3)


# --- manifests ------------------------------------------------------------------------------------


def _files_of(manifest: bytes, url: str) -> dict[str, tuple[int, str]]:
    """Return size and hash of each file in a manifest.  Raises UserError if it is invalid."""
    try:
        files = json.loads(manifest)["files"]
        found = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the manifest of {url} is broken.", remedy="Use another checkpoint.") from error
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in found):
        raise UserError(f"the manifest of {url} lists files outside of its folder.")
    return found


def _counting(on_progress: Progress | None, before: int, total: int) -> Any:
    """Return fsspec's callback for one of several files, `before` bytes of which are done already."""
    from fsspec.callbacks import Callback

    def tell(_size: int | None, value: int, **_: object) -> None:
        if on_progress is not None:
            on_progress(before + value, total)

    return Callback(hooks={"tell": tell})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
