"""What an exception or the death of an attempt's process is told as."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.trial import AttemptEnd, FailureKind
from autosft.studies.wire import to_plain
from autosft.workers.device import CPU, CUDA
from autosft.workers.processes.failures import failure_kind
from autosft.workers.runners.attempt_monitor import Attempt, log_path_of
from autosft.workers.scoring.evaluation import evaluating
from tests.workers.scripted import end, make_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks")


class OutOfMemoryError(RuntimeError):
    __module__ = "torch"


class DistBackendError(RuntimeError):
    __module__ = "torch.distributed"


@dataclass(frozen=True)
class Raised:
    name: str
    error: BaseException
    on_cpu: FailureKind
    on_gpu: FailureKind


def raised_while_handling(error: Exception, earlier: Exception) -> Exception:
    try:
        try:
            raise earlier
        except Exception:
            raise error  # noqa: B904
    except Exception as caught:
        return caught


RAISED = [
    Raised("device", OutOfMemoryError("CUDA"), FailureKind.OUT_OF_MEMORY, FailureKind.OUT_OF_MEMORY),
    Raised("Python", MemoryError(), FailureKind.OUT_OF_MEMORY, FailureKind.HOST_OUT_OF_MEMORY),
    Raised(
        "torch on the CPU",
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        FailureKind.OUT_OF_MEMORY,
        FailureKind.HOST_OUT_OF_MEMORY,
    ),
    Raised("C++", RuntimeError("std::bad_alloc"), FailureKind.OUT_OF_MEMORY, FailureKind.HOST_OUT_OF_MEMORY),
    Raised(
        "oneDNN",
        RuntimeError("could not create a primitive"),
        FailureKind.OUT_OF_MEMORY,
        FailureKind.HOST_OUT_OF_MEMORY,
    ),
    Raised(
        "a library that could not be mapped",
        ImportError("libx.so: failed to map segment from shared object"),
        FailureKind.OUT_OF_MEMORY,
        FailureKind.HOST_OUT_OF_MEMORY,
    ),
    Raised(
        "a thread without a stack",
        RuntimeError("can't start new thread"),
        FailureKind.OUT_OF_MEMORY,
        FailureKind.HOST_OUT_OF_MEMORY,
    ),
    Raised(
        "clean-up after a failed allocation",
        raised_while_handling(KeyError("handle"), MemoryError()),
        FailureKind.OUT_OF_MEMORY,
        FailureKind.HOST_OUT_OF_MEMORY,
    ),
    Raised(
        "the user's data, found by an allocation",
        raised_while_handling(UserError("record of 9 GB"), MemoryError()),
        FailureKind.BAD_DATA,
        FailureKind.BAD_DATA,
    ),
    Raised("bad data", UserError("line 3"), FailureKind.BAD_DATA, FailureKind.BAD_DATA),
    Raised(
        "another rank is gone",
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        FailureKind.WORKER_LOST,
        FailureKind.WORKER_LOST,
    ),
    Raised(
        "NCCL has lost another rank", DistBackendError(), FailureKind.WORKER_LOST, FailureKind.WORKER_LOST
    ),
    Raised("a bug", KeyError("loss"), FailureKind.ERROR, FailureKind.ERROR),
]


@pytest.mark.parametrize("case", RAISED, ids=lambda case: case.name)
def test_an_exception_has_a_kind(case: Raised) -> None:
    assert failure_kind(case.error, CPU) is case.on_cpu
    assert failure_kind(case.error, CUDA) is case.on_gpu


@pytest.mark.parametrize("case", RAISED, ids=lambda case: case.name)
def test_what_runs_out_of_memory_while_evaluating_is_a_kind_of_its_own(case: Raised) -> None:
    with pytest.raises(type(case.error)) as raised, evaluating():
        raise case.error
    for device, kind in ((CPU, case.on_cpu), (CUDA, case.on_gpu)):
        expect = FailureKind.EVALUATION_OUT_OF_MEMORY if kind is FailureKind.OUT_OF_MEMORY else kind
        assert failure_kind(raised.value, device) is expect
    case.error.__notes__.clear()  # the table is used again


# --- how a death without a report is told -------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    name: str
    failure: FailureKind
    message: str
    status: int | None
    oom_killed: bool = False
    log: str = ""


DEATHS = [
    Death("killed", FailureKind.WORKER_LOST, "SIGKILL", -signal.SIGKILL),
    Death("file gone", FailureKind.WORKER_LOST, "SIGBUS", -signal.SIGBUS),
    Death("OOM killer", FailureKind.HOST_OUT_OF_MEMORY, "host was out of memory", -signal.SIGKILL, True),
    Death("crash", FailureKind.ERROR, "SIGSEGV.*last thing", -signal.SIGSEGV, log="x\nlast thing\n"),
    Death(
        "Rust abort",
        FailureKind.OUT_OF_MEMORY,
        "of 9 bytes",
        -signal.SIGABRT,
        log="memory allocation of 9 bytes",
    ),
    Death(
        "crash with stacks",
        FailureKind.ERROR,
        "output: a$",
        -signal.SIGFPE,
        log="a\nFatal Python error: b\nc",
    ),
    Death("exit", FailureKind.ERROR, "exit code 3.*why", 3, log="why"),
    Death("quiet exit", FailureKind.ERROR, "exit code 0", 0),
    Death("server gone", FailureKind.WORKER_LOST, "warm server is gone", None),
]


class Canned:
    """A starter whose process says what it is told."""

    server_log = None

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.lines = [b'{"measurem', *(json.dumps(message).encode() for message in messages)]

    def start(self, request: dict[str, object]) -> Canned:
        return self

    def send(self, message: dict[str, object]) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("case", DEATHS, ids=lambda case: case.name)
def test_a_death_without_a_report_is_explained(case: Death, tmp_path: Path) -> None:
    job = make_job(output_dir=tmp_path)
    log_path_of(job).write_text(case.log)
    words = {"exits": [{"rank": 0, "status": case.status, "oom_killed": case.oom_killed}]}
    [event] = Attempt(Canned(*([words] if case.status is not None else [])), job).events()
    assert isinstance(event, AttemptEnd)
    assert event.failure is case.failure
    assert re.search(case.message, event.message), event.message


def test_a_report_that_is_no_measurement_ends_the_attempt(tmp_path: Path) -> None:
    [event] = Attempt(Canned({"measurement": {"loss": "low"}}), make_job(output_dir=tmp_path)).events()
    assert isinstance(event, AttemptEnd)
    assert event.failure is FailureKind.ERROR
    assert "unreadable report" in event.message


def test_what_a_gpu_attempt_reports_survives_without_nvml(tmp_path: Path) -> None:
    job = replace(make_job(output_dir=tmp_path), device_uuids=("GPU-none",))
    [event] = Attempt(Canned({"rank": 0, "pid": 1}, {"rank": 0, "end": to_plain(end(job))}), job).events()
    assert isinstance(event, AttemptEnd)
    assert event.completed
