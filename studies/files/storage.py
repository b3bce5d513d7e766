"""Access to storage through fsspec: file systems of URLs, retries, and errors that name what failed."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from autosft.profiles.errors import StorageError, UserError

T = TypeVar("T")

#: Delays before retries, in seconds; a permanent failure takes a little over a minute.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# Errors that a retry cannot fix.
_FOR_GOOD = (ImportError, ValueError, TypeError, NotImplementedError, PermissionError, FileNotFoundError)
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError")


def describe_error(error: BaseException) -> str:
    """Return a storage library's exception as a sentence."""
    said = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {said}." if said else f"{type(error).__name__}."


def with_retries(act: Callable[[], T]) -> T:
    """Call a function that may fail because of the network, with retries."""
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
def storage_errors(what: str) -> Iterator[None]:
    """Turn a storage library's exceptions into a StorageError that says what could not be done."""
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


def open_storage(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; with fsspec's listing cache disabled."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url, use_listings_cache=False)
    return fs, path.rstrip("/")


def package_of(url: str) -> str:
    """Return the package with which fsspec accesses a URL."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition(":")[0], {})
    return str(known.get("class", "fsspec")).partition(".")[0]


def driver_module(url: str) -> str:
    """Return the module that accesses a URL, for a process that imports it in advance."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition(":")[0], {})
    return str(known.get("class", "fsspec.core")).rpartition(".")[0]
