"""Load the tokenizer, the model and the adapter of a trial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.memory.trace.row_attention import attention_of_training
from autosft.profiles.model.adapters import peft_config
from autosft.studies.trial import TrialJob
from autosft.workers.load_weights import load_base
from autosft.workers.training.applied_step import shared_memory
from autosft.workers.training.fsdp import sharding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quiet() -> None:
    """Keep progress bars out of the trial's log."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def tokenizer_of(job: TrialJob) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the data of a job was prepared with."""
    source = tokenizer_source(job)
    # The tokenizer was checked when the data was prepared, and a trial should start fast.
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(
        source, trust_remote_code=job.trust_remote_code, is_checked=source != job.model
    )
    return tokenizer


def tokenizer_source(job: TrialJob) -> str:
    """Return where the study's tokenizer is: with the prepared data if autosft added its template to it."""
    prepared = Path(job.data_dir) / "tokenizer"
    return str(prepared) if prepared.is_dir() else job.model


def load_model(job: TrialJob) -> PreTrainedModel:
    """Load the weights in the study's precision; 4-bit for QLoRA."""
    model = load_base(
        weights_source(job),
        dtype=getattr(torch, job.pinned.precision.weight_dtype),
        method=job.settings.method,
        precision=job.pinned.precision,
        attn_implementation=attention_of_training(job.pinned.attention, padding_free=job.pinned.padding_free),
        distributed_config=sharding_of(job),
        trust_remote_code=job.trust_remote_code,
    )
    if shared_memory(model.named_parameters()):  # what load_state_dict(assign=True) makes of tied weights
        model.tie_weights()
    return model


def weights_source(job: TrialJob) -> str:
    """Return where the initial weights are: the base model, or a whole model's checkpoint to resume from."""
    return job.model if job.resume_from is None or job.settings.adapter else job.resume_from


def adapter(job: TrialJob, model: PreTrainedModel) -> Any | None:
    """Return peft's configuration of the adapter on a model, None when every parameter is trained."""
    adapter = job.settings.adapter
    return None if adapter is None else peft_config(adapter, model)
