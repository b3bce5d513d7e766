"""What only the runner on Ray can meet: an actor that cannot be created."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.profiles.errors import StudyFailedError
from autosft.studies.trial import AttemptEnd, FailureKind, TrialEvent
from autosft.workers.runners import ray_runner
from tests.workers.scripted import Script, make_job


class Unimportable:
    """An actor whose class Ray's workers cannot import: this module is not on their path."""

    def run(self, *_: object) -> Iterator[None]:
        yield


@pytest.mark.ray
def test_an_actor_that_cannot_be_created_names_the_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autosft.scheduler.cluster.ray_cluster import start_local

    monkeypatch.setattr(ray_runner, "TrialActor", Unimportable)
    with start_local() as cluster:
        cluster.wait_until_ready()
        runner = cluster.runner()
        runner.run(make_job(Script(), output_dir=tmp_path))
        events: list[TrialEvent] = []
        while not events:
            events += runner.events(30.0)
        runner.close(grace_s=0.0)
    [end] = events
    assert isinstance(end, AttemptEnd)
    assert end.failure is FailureKind.NOT_STARTED
    assert end.message.startswith("ModuleNotFoundError: No module named ")


@pytest.mark.parametrize("is_lost", [True, False])
def test_nothing_is_asked_of_a_ray_that_is_gone(is_lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request would take Ray's time-out of half a minute and more."""
    killed: list[object] = []
    monkeypatch.setattr(ray_runner, "WarmServer", object)
    monkeypatch.setattr(ray_runner.ray, "kill", killed.append)

    def wait_until_ready() -> None:
        if is_lost:
            raise StudyFailedError("Ray's gcs_server has died (SIGKILL)")

    runner = ray_runner.RayTrialRunner(object(), wait_until_ready=wait_until_ready)
    runner._idle[None] = ["actor"]
    runner.close(grace_s=60.0)
    assert killed == ([] if is_lost else ["actor"])
    assert not runner._idle
