"""What differs between the CPU and CUDA for a trial."""

from __future__ import annotations

from autosft.studies.trial import TrialJob


def runs_on_cpu(job: TrialJob) -> bool:
    """Whether host memory is the device memory of this job."""
    return all(uuid.startswith("CPU") for uuid in job.device_uuids)


def is_cpu_job(job: TrialJob) -> bool:
    """Whether the attempt runs on CPU cores (device ids of CPUs start with "CPU-")."""
    return all(uuid.startswith("CPU-") for uuid in job.device_uuids)
