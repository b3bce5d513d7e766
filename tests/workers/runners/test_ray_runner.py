"""What only the runner on Ray can meet: an actor that cannot be created."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
