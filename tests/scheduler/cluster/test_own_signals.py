"""What replaces Python's handler of SIGTERM while Ray starts is replaced by it again at once."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from autosft.scheduler.cluster.own_signals import keep_handlers_out, own_sigterm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to speak of")


def take_over() -> None:
    """Do what Ray's C++ code does: replace the handler behind Python's back, here by none."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN


@pytest.fixture
def heard() -> Iterator[list[int]]:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def test_a_handler_is_put_back_while_ray_starts(heard: list[int]) -> None:
    with own_sigterm():
        take_over()
        deadline = time.monotonic() + 60
        while not heard and time.monotonic() < deadline:
            signal.raise_signal(signal.SIGTERM)
    assert heard


def test_a_handler_is_put_back_at_the_end(heard: list[int]) -> None:
    with own_sigterm():
        take_over()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_what_has_no_handler_of_python_stays(heard: list[int]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with own_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert not heard


@pytest.mark.ray
def test_this_version_of_ray_can_be_told_to_install_no_handlers() -> None:
    import ray

    assert keep_handlers_out(ray._raylet.__file__)
