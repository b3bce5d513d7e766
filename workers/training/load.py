"""Loading a tokenizer, a model and an adapter for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from autosft.profiles.errors import MissingExtraError
from autosft.profiles.memory.trace.row_attention import attention_of_training
from autosft.profiles.model.adapted_layers import read_directly
from autosft.profiles.model.adapters import peft_config
from autosft.profiles.model.model_class import auto_class_of, build, ready_for_text
from autosft.profiles.recipe import Method
from autosft.studies.trial import TrialJob
from autosft.workers.training.fsdp import sharding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quiet() -> None:
    """Keep progress bars out of the trial's log."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_tokenizer(job: TrialJob) -> PreTrainedTokenizerBase:
    """Return the tokenizer; padding falls back on the end-of-sequence token, which labels never score."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(job), trust_remote_code=job.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_source(job: TrialJob) -> str:
    """Where the tokenizer of this study stands: beside the prepared data where our own template was added."""
    prepared = Path(job.data_dir) / "tokenizer"
    return str(prepared) if prepared.is_dir() else job.model


def load_model(job: TrialJob) -> PreTrainedModel:
    """Load the weights in the study's precision; 4-bit for QLoRA."""
    precision, quantization = job.pinned.precision, None
    if job.settings.method is Method.QLORA:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(what="--method qlora", extra="gpu") from error
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16 if precision.scales_loss else torch.bfloat16,
            llm_int8_skip_modules=_kept_whole(job),
        )
    source = weights_source(job)
    model: PreTrainedModel = auto_class_of(source, trust_remote_code=job.trust_remote_code).from_pretrained(
        source,
        dtype=getattr(torch, precision.weight_dtype),
        attn_implementation=attention_of_training(job.pinned.attention, padding_free=job.pinned.padding_free),
        quantization_config=quantization,
        distributed_config=sharding_of(job),
        trust_remote_code=job.trust_remote_code,
    )
    return ready_for_text(model)


def _kept_whole(job: TrialJob) -> list[str] | None:
    """Return the layers that cannot be 4-bit, None where transformers knows them all (the output head)."""
    from transformers import AutoConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    config = AutoConfig.from_pretrained(weights_source(job), trust_remote_code=job.trust_remote_code)
    with torch.device("meta"):
        model = build(config, trust_remote_code=job.trust_remote_code)
    kept = [*read_directly(model)]
    return [*kept, *get_keys_to_not_convert(model)] if kept else None


def weights_source(job: TrialJob) -> str:
    """Where the weights to start from stand: the base model's beside adapters, else those of a checkpoint."""
    return job.model if job.resume_from is None or job.settings.lora else job.resume_from


def adapter(job: TrialJob, model: PreTrainedModel) -> Any | None:
    """Return peft's configuration of the adapter on a model, None when every parameter is trained."""
    lora = job.settings.lora
    return None if lora is None else peft_config(lora, model)
