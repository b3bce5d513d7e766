"""Keep Python's handler of SIGTERM while Ray starts inside this process.

Ray's C++ code replaces it, somewhere within `ray.init`, by one that prints a stack and aborts: a study that
was asked to stop in that second would end with 134 and without having saved anything.  Python can set a
handler in the main thread alone, which does something else meanwhile, and no Python runs within that call:
so Ray is told that its handlers are there already, by the flag of its own that it asks.  Should a version of
Ray have no such flag, the handler is put back, on the level of C, as soon as Python runs again.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator

#: More than any libc's struct sigaction, which begins with the handler's address.
_SIZE = 512
_EVERY_S = 0.005
#: ray::RayLog::is_failure_signal_handler_installed_, which InstallFailureSignalHandler reads first.
_FLAG = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"


def keep_handlers_out(raylet: str) -> bool:
    """Keep Ray, whose extension is the file `raylet`, from installing handlers of signals in this process.

    Returns whether this version can be told.  The handlers print C++ stacks of crashes; the process ends as
    it would without them.
    """
    try:
        flag = ctypes.c_bool.in_dll(ctypes.CDLL(raylet), _FLAG)
    except (OSError, ValueError):
        return False
    flag.value = True
    return True


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Put Python's handler of SIGTERM back as soon as something else replaces it; needs no main thread.

    Does nothing where Python has no handler for it, and on Windows.
    """
    if sys.platform == "win32" or not callable(signal.getsignal(signal.SIGTERM)):
        yield
        return
    ours, leave = _action(), threading.Event()

    def put_back() -> None:
        if not callable(signal.getsignal(signal.SIGTERM)):
            return  # given up in the meantime
        if _action().raw[: ctypes.sizeof(ctypes.c_void_p)] != ours.raw[: ctypes.sizeof(ctypes.c_void_p)]:
            ctypes.CDLL(None).sigaction(int(signal.SIGTERM), ours, None)

    def watch() -> None:
        while not leave.wait(_EVERY_S):
            put_back()

    watcher = threading.Thread(target=watch, name="own-sigterm", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        leave.set()
        watcher.join()
        put_back()


def _action() -> ctypes.Array[ctypes.c_char]:
    """Return what the process does at SIGTERM, as libc describes it."""
    found = ctypes.create_string_buffer(_SIZE)
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, found)
    return found
