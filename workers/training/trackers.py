"""Configure the experiment trackers of `--report-to`: TensorBoard, Weights & Biases, MLflow.

transformers' own callbacks do the reporting; this module sets the environment that they read and checks that
they are installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.studies.trial import TrialJob

#: Alternative modules of each tracker; the first is the package to install.
MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def check_installed(trackers: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is missing, before a study starts."""
    for name in trackers:
        if not any(importlib.util.find_spec(module) for module in MODULES[name]):
            raise UserError(
                f"--report-to {name}: the package {MODULES[name][0]} is not installed.",
                remedy=f"Install it with: pip install {MODULES[name][0]}",
            )


def set_environment(job: TrialJob) -> None:
    """Set where the trackers of this process write their logs; the user's variables take precedence.

    TensorBoard's go below the study's folder: `tensorboard --logdir <folder>/trials` compares them.
    """
    folder = Path(job.output_dir)
    named = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "WANDB_PROJECT": job.study,
        "WANDB_DIR": str(folder),
        "WANDB_RUN_GROUP": job.study,
        "MLFLOW_EXPERIMENT_NAME": job.study,
    }
    if job.report_to:
        for name, value in named.items():
            os.environ.setdefault(name, value)
