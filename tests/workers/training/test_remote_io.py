"""Trials whose checkpoints go to a bucket, over S3's real protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles import errors
from autosft.profiles.errors import UserError
from autosft.studies.files import remote, storage
from autosft.studies.files.checkpoints import inspect, trial_url, verify
from autosft.studies.results.losses import read_losses
from autosft.studies.trial import Measurement, Task, TrialJob
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.training.remote_io import DATA_MARKER
from autosft.workers.training.train import train
from tests.workers.small import job, make_data, make_model

pytest.importorskip("s3fs", reason="needs s3fs")
pytest.importorskip("moto", reason="needs moto, an S3 server")

pytestmark = pytest.mark.slow

#: Runs the job on its standard input and kills itself: while it uploads, or between that and its report.
SCRIPT = """
import json, os, signal, sys
from autosft.studies.files import remote
from autosft.studies.trial import TrialJob
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.training.train import train

job, point, evaluation = from_plain(TrialJob, json.loads(sys.stdin.readline())), sys.argv[1], int(sys.argv[2])
evaluations = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def report(one):
    if one.is_evaluation and point == "reporting" and one.evaluation == evaluation:
        die()
    if one.is_evaluation:
        evaluations.append(one)
        print(json.dumps(to_plain(one)), flush=True)

real = remote._send
def send(fs, source, target, on_progress):
    real(fs, source, target, on_progress)
    if point == "uploading" and len(evaluations) == evaluation - 1 and "checkpoints" in target:
        die()

remote._send = send
train(job, report, lambda: None)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on an S3 server of this machine."""
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "Running on http" in line)
        endpoint = line.split()[-1].rstrip("/")
        values = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
            yield "s3://bucket"
        server.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def evaluations(job_: TrialJob) -> list[Measurement]:
    reports: list[Measurement] = []
    assert train(job_, reports.append, lambda: None).completed
    return [report for report in reports if report.is_evaluation]


def losses(found: list[Measurement]) -> list[float | None]:
    return [item.metric("eval_loss") for item in found]


def test_a_bucket_that_is_not_there_is_one_error_and_is_not_made(bucket: str) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="a small object could not be written"):
            remote.probe("s3://nosuch/studies")
    remote.probe(f"{bucket}/studies")
    assert list(remote.strays(f"{bucket}/studies", known=(), running=())) == []


@pytest.mark.parametrize("point", ["uploading", "reporting"])
def test_a_trial_killed_at_its_checkpoint_resumes_elsewhere(
    point: str, bucket: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    study = f"{bucket}/{point}"
    remote.upload(data, f"{bucket}/.cache/data", marker=DATA_MARKER)
    whole = losses(evaluations(job(model, data, tmp_path / "local")))
    own = job(model, data, tmp_path / "node-1", store_url=trial_url(study, 0))
    own = replace(own, data_dir=f"{bucket}/.cache/data")
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, point, "3"],
        input=json.dumps(to_plain(own)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert killed.returncode == -signal.SIGKILL
    lines = [line for line in killed.stdout.splitlines() if line.startswith('{"')]  # and not the trainer's
    reported = [from_plain(Measurement, json.loads(line)) for line in lines]
    assert losses(reported) == whole[:2]
    addresses = [str(item.checkpoint) for item in reported]
    for item in reported:  # what was reported is there, whole
        folder = remote.fetched(str(item.checkpoint))
        verify(folder)
        assert inspect(folder) == item.contents
    # The third was never reported: half there, or whole.
    [stray] = remote.strays(study, known=addresses, running=())
    assert remote.exists(stray) is (point == "reporting")
    # Another node goes on from the last that was reported, with the curve that it would have had.
    again = replace(own, attempt=2, output_dir=str(tmp_path / "node-2"), resume_from=addresses[-1])
    rest = evaluations(again)
    assert losses(rest) == pytest.approx(whole[2:], rel=1e-6)
    assert not (tmp_path / "node-2" / "checkpoints").exists()
    assert list((tmp_path / "node-2").glob("staging-*")) == []
    known = {*addresses, *(str(item.checkpoint) for item in rest)}
    remote.sweep(study, known=known, running=())
    remote.settle()
    assert list(remote.strays(study, known=(), running=())) == sorted(known)
    # A third node scores the best, and the losses by example come here.
    score = replace(
        again,
        task=Task.SCORE,
        output_dir=str(tmp_path / "node-3" / "final"),
        store_url=f"{again.store_url}/final",
        resume_from=str(rest[-1].checkpoint),
    )
    reports: list[Measurement] = []
    assert train(score, reports.append, lambda: None).completed
    remote.mirror(study, tmp_path / "driver")
    here = sorted(path.name for path in (tmp_path / "driver").rglob("*.json"))
    assert here == [
        "1.json",
        "2.json",
        "3.json",
        "4.json",
        str(rest[-1].checkpoint).rpartition("/")[2] + ".json",
    ]
    final = next((tmp_path / "driver").rglob("final/*.json"))
    assert read_losses(final).loss == pytest.approx(reports[-1].metric("eval_loss"), rel=1e-6)


def test_unreachable_storage_is_reported_after_a_while(
    bucket: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "WAITS_S", (0.0,))
    own = job(model, data, tmp_path / "node", store_url="s3://nosuch/study/trials/0000")
    with pytest.raises(errors.StorageError, match="could not be uploaded to s3://nosuch"):
        train(own, lambda _: None, lambda: None)
