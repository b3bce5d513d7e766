"""Folders at a URL (s3://, gs://, …: any of fsspec's), each whole or not there.

A folder is uploaded file by file and its manifest, which lists them with their hashes, last; it is deleted
manifest first.  So a folder with a manifest is complete, whatever was killed, and one without is swept.
What fails is tried again for about a minute; then StorageError says so.

Limits: one stream of PART_BYTES at a time through fsspec's generic interface, so that a trial under a memory
cap can do it.  What a killed upload leaves of a multi-part one is for the bucket's own rules to delete.
"""

from __future__ import annotations

import contextlib
import errno
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

T = TypeVar("T")
Progress = Callable[[int, int], object]  # bytes done, bytes in all

#: Waits before what has failed is tried again; what fails for good takes a little over a minute.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: What is read and sent at a time; S3 takes at most 10,000 parts a file.
PART_BYTES = 32 << 20
#: Checkpoints that stay on this machine after they were fetched to be looked at.
NUM_CACHED = 4

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://")
# Asking again changes nothing about these.
_FOR_GOOD = (ImportError, ValueError, TypeError, NotImplementedError, PermissionError, FileNotFoundError)
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError")


def is_url(address: str) -> bool:
    """Whether an address is a URL and no folder of this machine."""
    return _URL.match(address) is not None


# --- uploading ------------------------------------------------------------------------------------


def probe(url: str) -> None:
    """Write, read and delete a small object at a URL.  Raises UserError that says what is missing."""
    name = f".autosft-probe-{secrets.token_hex(4)}"
    try:
        fs, root = _open(url)
        path = f"{root}/{name}"
        _in_folder(fs, root, partial(fs.pipe_file, path, name.encode()))
        if fs.cat_file(path) != name.encode():
            raise OSError("what was written came back changed")
        fs.rm_file(path)
    except ImportError as error:
        package = _driver(url)
        raise UserError(
            f"--output {url}: {package} is needed for {url.partition(':')[0]} storage and is not installed.",
            remedy=f"pip install {package}, on every node.",
        ) from error
    except Exception as error:  # each library has its own exceptions for credentials, buckets and networks
        raise UserError(
            f"--output {url}: a small object could not be written, read and deleted there: "
            f"{describe_error(error)}",
            remedy=f"Check that the bucket is there, and that the credentials and the endpoint that "
            f"{_driver(url)} finds in the environment of every node may write to it.",
        ) from error


def upload(
    folder: Path, url: str, *, marker: str = MANIFEST, on_progress: Callable[[], object] = lambda: None
) -> None:
    """Copy a folder to a URL; its manifest, called `marker` there, comes last and makes it whole.

    Calls `on_progress` after each part.  Raises StorageError.
    """
    sealed = folder / MANIFEST
    manifest = (
        sealed.read_text() if marker == MANIFEST and sealed.is_file() else manifest_of(folder, name=marker)
    )
    fs, root = _open(url)
    with _named(f"{folder} could not be uploaded to {url}"):
        for name in json.loads(manifest)["files"]:
            _patiently(partial(_send, fs, folder / name, f"{root}/{name}", on_progress))
        _patiently(lambda: fs.pipe_file(f"{root}/{marker}", manifest.encode()))


def _send(fs: Any, source: Path, target: str, on_progress: Callable[[], object]) -> None:
    opened = partial(fs.open, target, "wb", block_size=PART_BYTES)
    with source.open("rb") as file, _in_folder(fs, posixpath.dirname(target), opened) as out:
        while part := file.read(PART_BYTES):
            out.write(part)
            on_progress()
    if fs.size(target) != source.stat().st_size:
        raise OSError(f"{target} came out at another size")


def _in_folder(fs: Any, folder: str, write: Callable[[], T]) -> T:
    """Write something, making the folder that it goes to where there are folders; a bucket is never made."""
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
    """Copy a small file to a URL.  Raises StorageError."""
    fs, target = _open(url)
    with _named(f"{path} could not be uploaded to {url}"):
        _patiently(lambda: _send(fs, path, target, lambda: None))


# --- fetching -------------------------------------------------------------------------------------


def exists(url: str, *, marker: str = MANIFEST) -> bool:
    """Whether a whole folder is at a URL.  Raises StorageError."""
    fs, root = _open(url)
    with _named(f"{url} could not be looked at"):
        return bool(_patiently(lambda: fs.exists(f"{root}/{marker}")))


def download(
    url: str,
    folder: Path,
    *,
    marker: str = MANIFEST,
    on_progress: Progress | None = None,
) -> None:
    """Copy a folder from a URL, whole and with the hashes that it was written with, or not at all.

    Calls `on_progress` with the bytes done and to be done.  Raises StorageError, and UserError for what is
    not what was written.
    """
    fs, root = _open(url)
    staged = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    staged.mkdir(parents=True)
    try:
        with _named(f"{url} could not be fetched"):
            manifest = _patiently(lambda: fs.cat_file(f"{root}/{marker}"))
            files = _files_of(manifest, url)
            total, done = sum(num_bytes for num_bytes, _ in files.values()), 0
            for name, (num_bytes, sha256) in files.items():
                target = staged / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source, callback = f"{root}/{name}", _counting(on_progress, done, total)
                _patiently(partial(fs.get_file, source, str(target), callback=callback))
                if target.stat().st_size != num_bytes or _sha256(target) != sha256:
                    raise UserError(
                        f"{url}/{name} is not what was written: its sha256 differs.",
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
    """Return a folder on this machine with what is at an address: a local one itself, a URL's fetched once.

    Of those in the cache, which is the user's own where none is given, the last NUM_CACHED that were asked
    for stay; all of a `cache` that is given.
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
    """Copy a small file from a URL; False where there is none.  Raises StorageError."""
    fs, source = _open(url)
    with _named(f"{url} could not be fetched"):
        try:
            content = _patiently(lambda: fs.cat_file(source))
        except FileNotFoundError:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return True


def mirror(url: str, folder: Path) -> None:
    """Fetch what a study's trials have measured example by example and this machine lacks.

    Those are small files that workers on other nodes have written.  Raises StorageError.
    """
    fs, root = _open(url)
    with _named(f"{url} could not be looked at"):
        names = [name for name in _find(fs, root, "trials") if name.split("/")[2] in ("evaluations", "final")]
    missing = [name for name in names if not (folder / name).is_file()]
    with ThreadPoolExecutor(8) as several:
        list(several.map(lambda name: get_file(f"{url}/{name}", folder / name), missing))


# --- deleting -------------------------------------------------------------------------------------


def remove(url: str) -> None:
    """Delete a folder at a URL; where this is cut short, the rest has no manifest.  Raises StorageError."""
    fs, root = _open(url)
    with _named(f"{url} could not be deleted"):
        for name in (f"{root}/{MANIFEST}", root):
            with contextlib.suppress(FileNotFoundError):
                fs.rm(name, recursive=name == root)


def discard(urls: Iterable[str]) -> None:
    """Delete folders that nothing points at any more, behind the caller's back.

    Whoever ends first waits for it (`settle`); what is left over is swept when the study next starts.
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
    """Wait for what is being deleted, for a while."""
    deadline = time.monotonic() + timeout_s
    for thread in _discarding:
        thread.join(max(0.0, deadline - time.monotonic()))


def sweep(url: str, *, known: Collection[str], running: Collection[int]) -> None:
    """Delete what killed processes have left of checkpoints at a study's URL, as far as it is reached."""
    with contextlib.suppress(StorageError):
        discard(list(strays(url, known=known, running=running)))


def remove_study(url: str) -> None:
    """Delete all that is at a study's URL.  Raises StorageError."""
    fs, root = _open(url)
    with _named(f"{url} could not be deleted"), contextlib.suppress(FileNotFoundError):
        fs.rm(root, recursive=True)


def strays(url: str, *, known: Collection[str], running: Collection[int]) -> Iterator[str]:
    """Yield checkpoints of a study at a URL that no record knows: half-uploaded, or never reported.

    Those of `running` trials are left alone.  Raises StorageError.
    """
    fs, root = _open(url)
    with _named(f"{url} could not be looked at"):
        names = _find(fs, root, "trials")
    folders = {"/".join(name.split("/")[:4]) for name in names if name.split("/")[2] == "checkpoints"}
    for folder in sorted(folders):
        if f"{url}/{folder}" not in known and int(folder.split("/")[1]) not in running:
            yield f"{url}/{folder}"


def _find(fs: Any, root: str, below: str) -> list[str]:
    """Return the names of all files below a folder, relative to `root`, that lie at least two deeper."""
    fs.invalidate_cache()
    try:
        found = _patiently(lambda: fs.find(f"{root}/{below}"))
    except FileNotFoundError:
        return []
    names = [path[len(root) :].strip("/") for path in found]
    return sorted(name for name in names if name.count("/") >= 3)


# --- errors, and trying again ---------------------------------------------------------------------


def describe_error(error: BaseException) -> str:
    """Return an exception of a storage library as a sentence."""
    said = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {said}." if said else f"{type(error).__name__}."


def _patiently(act: Callable[[], T]) -> T:
    """Do something that a network may spoil, again and again for a while."""
    for wait_s in WAITS_S:
        try:
            return act()
        except _FOR_GOOD:
            raise
        except Exception as error:  # each library has its own
            if type(error).__name__ in _NO_CREDENTIALS or _is_disk_full(error):
                raise
            time.sleep(wait_s)
    return act()


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn what a storage library raises into a StorageError that says what could not be done."""
    try:
        yield
    except (UserError, StorageError):
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise
        raise StorageError(f"{what}: {describe_error(error)}") from error


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _open(url: str) -> tuple[Any, str]:
    """Return the file system behind a URL and the path in it; without its own memory of what is there."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url, use_listings_cache=False)
    return fs, path.rstrip("/")


def _driver(url: str) -> str:
    """Return the package by which fsspec reaches a URL."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition(":")[0], {})
    return str(known.get("class", "fsspec")).partition(".")[0]


def driver_module(url: str) -> str:
    """Return the module that reaches a URL, for a process that imports it ahead."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition(":")[0], {})
    return str(known.get("class", "fsspec.core")).rpartition(".")[0]


def _files_of(manifest: bytes, url: str) -> dict[str, tuple[int, str]]:
    """Return size and hash of each file in a manifest.  Raises UserError for one that is none of ours."""
    try:
        files = json.loads(manifest)["files"]
        found = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the manifest of {url} is broken.", remedy="Use another checkpoint.") from error
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in found):
        raise UserError(f"the manifest of {url} names files outside of its folder.")
    return found


def _counting(on_progress: Progress | None, before: int, total: int) -> Any:
    """Return fsspec's callback for one file of several, of which `before` bytes are there already."""
    from fsspec.callbacks import Callback

    def tell(_size: int | None, value: int, **_: object) -> None:
        if on_progress is not None:
            on_progress(before + value, total)

    return Callback(hooks={"tell": tell})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
