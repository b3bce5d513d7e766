"""Read and write an attempt's files at its study's URL, if it has one (`TrialJob.store_url`).

Everything else in this package uses folders of this node.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosft.profiles.own_folders import cache_folder
from autosft.studies.files import remote
from autosft.studies.files.checkpoints import checkpoint_url, inspect, seal, verify
from autosft.studies.trial import Contents, TrialJob
from autosft.workers.ranks import Gang, staging_dir

#: Written last: prepared data at a URL is complete if this file exists.
DATA_MARKER = "files.json"
#: Seconds between two checks of an upload that is waited for.
LOOK_S = 0.5


def with_data_here(job: TrialJob) -> TrialJob:
    """Return the job with its prepared data on this node, fetched once for all trials there."""
    cache = cache_folder() / "data" / "fetched"
    return replace(job, data_dir=str(remote.fetched(job.data_dir, cache=cache, marker=DATA_MARKER)))


def with_inputs_here(job: TrialJob, gang: Gang) -> TrialJob:
    """Return the job with all its inputs on this node; a checkpoint to resume from is verified.

    Called by all ranks.  Raises StorageError, and UserError for a checkpoint that is not what was written.
    """
    resume_from = job.resume_from
    if resume_from is not None and remote.is_url(resume_from):
        here = staging_dir(job) / resume_from.rpartition("/")[2]
        if gang.rank == 0:
            _sweep(job)
            remote.download(resume_from, here)
        resume_from = str(here)
    elif resume_from is not None and gang.rank == 0:
        verify(Path(resume_from))
    gang.wait()  # for rank 0's download and check
    return replace(with_prompts_here(with_data_here(job)), resume_from=resume_from)


def with_prompts_here(job: TrialJob) -> TrialJob:
    """Return the job with the prompts of its metric and the best trial's answers on this node."""
    scoring = job.scoring
    if scoring is None or job.store_url is None:
        return job
    study, url = Path(job.output_dir).parents[1], job.store_url.rsplit("/", 2)[0]
    there: dict[str, Any] = {}
    for name in ("prompts", "incumbent"):
        path = getattr(scoring, name)
        if path is not None and not Path(path).is_file():
            is_there = remote.get_file(f"{url}/{Path(path).relative_to(study).as_posix()}", Path(path))
            there[name] = path if is_there else None
    return replace(job, scoring=replace(scoring, **there))


def _sweep(job: TrialJob) -> None:
    """Delete what killed attempts of this trial left behind on this node."""
    own = staging_dir(job)
    for folder in own.parent.glob("staging-*"):
        if folder != own:
            shutil.rmtree(folder, ignore_errors=True)


def publish(job: TrialJob, path: Path) -> None:
    """Copy a small file of the job's folder to the job's URL, if it has one.  Raises StorageError."""
    if job.store_url is not None and path.is_file():
        remote.put_file(path, f"{job.store_url}/{path.relative_to(job.output_dir).as_posix()}")


class CheckpointUpload:
    """The upload of a checkpoint, in the background while the model is evaluated."""

    def __init__(self, job: TrialJob, folder: Path, *, step: int) -> None:
        """Seal a finished folder and start to upload it; it is deleted here once it is uploaded."""
        assert job.store_url is not None
        seal(folder)
        self.contents: Contents = inspect(folder)
        self._folder = folder
        self._url = checkpoint_url(job.store_url, job.attempt, step)
        self._num_parts = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._upload, name="upload", daemon=True)
        self._thread.start()

    def _upload(self) -> None:
        try:
            remote.upload(self._folder, self._url, on_progress=self._count)
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def _count(self) -> None:
        self._num_parts += 1

    def wait(self, on_progress: Callable[[], object]) -> None:
        """Wait until the checkpoint is uploaded; `on_progress` is called whenever a part is.

        Raises StorageError if the upload failed.
        """
        seen = 0
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
            if self._num_parts != seen:
                seen = self._num_parts
                on_progress()
        if self._error is not None:
            raise self._error
        shutil.rmtree(self._folder, ignore_errors=True)
