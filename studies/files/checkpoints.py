"""A study's folder: its layout, which checkpoints to keep, and integrity checks.

    <output>/<slug of the study's name>/
        best.yaml
        trials/0007/
            checkpoints/step-000120/     a model folder; with optimizer, scheduler and random state to resume
            evaluations/3.json           per-example losses of evaluation 3
            evaluations/3.ifeval.json    which prompts were followed, by a metric of prompts
            final/step-000120.json       the same on the examples that were not used to choose
        trials/untuned/
            evaluations/0.json           per-example losses of the model before tuning, once per study

With --output URL, that folder holds what a machine writes and reads locally; checkpoints are stored at the
URL (`remote`), with a copy of the per-example measurements.

Deciding (`to_remove`) is separate from acting (`remove`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.studies.trial import Contents, Measurement, TrialRecord, TrialState
from autosft.studies.values import CheckpointRecord

MANIFEST = "manifest.json"

#: Number of the evaluation before the first step; those of trials count from 1.
UNTUNED_EVALUATION = 0

#: Device names that Windows reserves.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def slug(name: str) -> str:
    """Return a file name for a study's name: a-z, 0-9, `.`, `-` and `_`, at most 73 characters.

    A name that has to be changed gets a hash appended, so that different studies never share a folder, even
    on a case-insensitive file system.
    """
    safe = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-")
    if safe and safe == name and safe not in _RESERVED and len(safe) <= 73:
        return safe
    return f"{safe[:64].rstrip('.-') or 'study'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def study_dir(output: Path, name: str) -> Path:
    return output / slug(name)


def trial_dir(study: Path, number: int) -> Path:
    return study / "trials" / f"{number:04d}"


def untuned_dir(study: Path) -> Path:
    """Return where a study's untuned model is scored, its evaluation being number UNTUNED_EVALUATION."""
    return study / "trials" / "untuned"


def checkpoint_dir(trial: Path, step: int) -> Path:
    return trial / "checkpoints" / f"step-{step:06d}"


def trial_url(study: str, number: int) -> str:
    """Return the URL of a trial below its study's."""
    return f"{study}/trials/{number:04d}"


def untuned_url(study: str) -> str:
    """Return the URL of the untuned model's scores below its study's."""
    return f"{study}/trials/untuned"


def checkpoint_url(trial: str, attempt: int, step: int) -> str:
    """Return the URL of a trial's checkpoint below the trial's; later attempts never write there."""
    return f"{trial}/checkpoints/attempt-{attempt}-step-{step:06d}"


def evaluation_path(trial: Path, evaluation: int) -> Path:
    return trial / "evaluations" / f"{evaluation}.json"


def prompt_scores_path(trial: Path, evaluation: int) -> Path:
    return trial / "evaluations" / f"{evaluation}.ifeval.json"


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in the name of a checkpoint folder."""
    return int(checkpoint.name.rpartition("-")[2])


def score_path(checkpoint: Path) -> Path:
    """Return the file of a checkpoint's losses on the final examples; it outlives the checkpoint."""
    return checkpoint.parent.parent / "final" / f"{checkpoint.name}.json"


# --- what to keep ---------------------------------------------------------------------------------


def to_remove(
    checkpoints: Iterable[CheckpointRecord], trials: Sequence[TrialRecord], *, keep_best: int, maximize: bool
) -> tuple[CheckpointRecord, ...]:
    """Return the checkpoints that are no longer needed.

    Kept are the `keep_best` best of the whole study, the `keep_best` best of the trials that are over, since
    only these are sure to count, and the last of each trial that is not over (preferably one that can be
    resumed from).  Checkpoints of trials that failed, did not fit or diverged never count as best.  Ties go
    to the earlier trial and step.
    """
    everything = list(checkpoints)
    finite = ranked(everything, trials, maximize=maximize)
    over = [checkpoint for checkpoint in finite if trials[checkpoint.trial].state.is_over]
    keep = {checkpoint.path for group in (finite, over) for checkpoint in group[:keep_best]}
    for trial in {
        checkpoint.trial for checkpoint in everything if not trials[checkpoint.trial].state.is_over
    }:
        own = [checkpoint for checkpoint in everything if checkpoint.trial == trial]
        keep.add(max(own, key=lambda checkpoint: (checkpoint.has_resume_state, checkpoint.step)).path)
    return tuple(checkpoint for checkpoint in everything if checkpoint.path not in keep)


def ranked(
    checkpoints: Iterable[CheckpointRecord], trials: Sequence[TrialRecord], *, maximize: bool
) -> list[CheckpointRecord]:
    """Return the checkpoints that may be the best, best first; ties go to the earlier trial and step."""

    def rank(checkpoint: CheckpointRecord) -> tuple[float, int, int]:
        value = checkpoint.value
        assert value is not None
        return (-value if maximize else value, checkpoint.trial, checkpoint.step)

    candidates = [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.value is not None
        and math.isfinite(checkpoint.value)
        and _is_result(trials[checkpoint.trial])
    ]
    return sorted(candidates, key=rank)


def _is_result(trial: TrialRecord) -> bool:
    if trial.state in (TrialState.FAILED, TrialState.INFEASIBLE):
        return False
    return trial.value is None or math.isfinite(trial.value)


def may_be_removed(path: Path, study: Path) -> bool:
    """Whether a path on record is a checkpoint's below a study's folder, and no link leads out of that.

    A row of the database may name anything, if somebody else has written it.
    """
    try:
        place = path.resolve().relative_to(study.resolve())
    except (OSError, ValueError):
        return False
    return len(place.parts) == 4 and place.parts[0] == "trials" and not path.is_symlink()


def remove(folder: Path) -> None:
    """Delete a folder; if interrupted, what remains does not look like a checkpoint.

    Does nothing if the folder does not exist on this machine.
    """
    if not folder.exists():
        return
    doomed = folder.with_name(f"removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def strays(study: Path, *, known: Collection[str], running: Collection[int]) -> Iterator[Path]:
    """Yield folders that killed processes left: half-written, half-deleted, or never reported.

    Folders of `running` trials are skipped, since their reports may be on the way.
    """
    for trial in sorted((study / "trials").glob("[0-9]*")):
        if int(trial.name) in running:
            continue
        yield from sorted(trial.glob("staging-*"))
        for folder in sorted((trial / "checkpoints").glob("*")):
            if str(folder) not in known:
                yield folder


def is_gone(checkpoint: CheckpointRecord) -> bool:
    """Whether a checkpoint that this machine has seen in its folder is gone."""
    was_seen = checkpoint.num_bytes > 0 and "://" not in checkpoint.path
    return was_seen and not Path(checkpoint.path).is_dir()


# --- integrity ------------------------------------------------------------------------------------


def inspect(folder: Path) -> Contents:
    """Return what a folder holds, without reading its weights.

    A folder that is not visible from this machine is assumed to hold resume state.
    """
    if not folder.is_dir():
        return Contents(num_bytes=0, sha256="", has_resume_state=True)
    files = list(_files(folder))
    manifest = folder / MANIFEST
    return Contents(
        num_bytes=sum(path.stat().st_size for path in files),
        sha256=_sha256(manifest) if manifest.is_file() else "",
        # optimizer.pt, optimizer.bin, or the folder optimizer_0 of a sharded one
        has_resume_state=any(path.name.startswith("optimizer") for path in folder.iterdir()),
    )


def reported(measurement: Measurement, *, metric: str, now: float) -> CheckpointRecord | None:
    """Return the record of the checkpoint that a report names, None if it names none."""
    if measurement.checkpoint is None:
        return None
    contents = measurement.contents or inspect(Path(measurement.checkpoint))
    return CheckpointRecord(
        trial=measurement.trial,
        attempt=measurement.attempt,
        step=measurement.step,
        evaluation=measurement.evaluation,
        value=measurement.metric(metric),
        path=measurement.checkpoint,
        num_bytes=contents.num_bytes,
        sha256=contents.sha256,
        has_resume_state=contents.has_resume_state,
        created_at=now,
    )


def manifest_of(folder: Path, *, name: str = MANIFEST) -> str:
    """Return a manifest as JSON: the folder's files, except the manifest itself, with sizes and hashes."""
    manifest = {
        str(path.relative_to(folder).as_posix()): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
        if path.name != name
    }
    return json.dumps({"version": 1, "files": manifest}, indent=1)


def seal(folder: Path) -> None:
    """Write the manifest of hashes into a finished folder."""
    (folder / MANIFEST).write_text(manifest_of(folder))


def install(staged: Path, final: Path) -> None:
    """Seal a finished folder with a manifest of hashes and move it into place atomically.

    Both paths have to be on one file system.  An earlier attempt's folder at `final` is replaced.
    """
    seal(staged)
    final.parent.mkdir(parents=True, exist_ok=True)
    share_like_folder(staged, final.parent)
    remove(final)
    staged.replace(final)


def share_like_folder(staged: Path, parent: Path) -> None:
    """Let whoever may read a folder read the files that are put into it.

    safetensors writes its files for their owner alone, also where all others of a checkpoint are the group's.
    """
    readable = stat.S_IMODE(parent.stat().st_mode) & 0o666
    for path in _files(staged):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | (readable & 0o444))


def verify(folder: Path) -> None:
    """Check that every file of a sealed folder exists and has its hash.  Raises UserError."""
    remedy = "Use another checkpoint, or train it again; the disk or a copy may be faulty."
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {MANIFEST}, so it cannot be checked.", remedy=remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} is broken.", remedy=remedy) from error
    for name, (num_bytes, sha256) in sorted(expected.items()):
        path = folder / name
        if not _is_file_below(folder, name):
            raise UserError(f"{path} is missing.", remedy=remedy)
        if path.stat().st_size != num_bytes or _sha256(path) != sha256:
            raise UserError(f"{path} is not what was written: its sha256 differs.", remedy=remedy)


def verify_if_sealed(folder: Path) -> None:
    """Check a folder against its manifest, if it has one (other tools write none).  Raises UserError."""
    if (folder / MANIFEST).is_file():
        verify(folder)


def _is_file_below(folder: Path, name: str) -> bool:
    """Whether a name out of somebody's manifest is that of a file in its folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    try:
        return (folder / name).is_file()
    except OSError:  # a name that is too long
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
