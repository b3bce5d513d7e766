"""A model of a few thousand parameters and a few dozen examples: enough to train on in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autosft.profiles.dataset.prepared import eval_fingerprint
from autosft.profiles.recipe import AdapterSettings, Method, Precision
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings, TrialJob
from tests.plans import GIB, execution_plan

VOCAB_SIZE = 32
EVAL_SEQ_LEN = 12


def make_model(
    folder: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    is_tied: bool = False,
    hidden_size: int = 16,
    intermediate_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    num_kv_heads: int = 1,
) -> Path:
    """Write a small Llama with a word-level tokenizer; it may have rows for more words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


def make_data(folder: Path, *, num_train: int = 40, num_eval: int = 10, num_final: int = 6) -> Path:
    """Write train/, eval/ and final/ of random counting sequences: the answer continues the prompt."""
    from datasets import Dataset

    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("eval", num_eval), ("final", num_final)):
        rows = []
        for _ in range(count):
            length, first = int(rng.integers(5, 13)), int(rng.integers(2, 15))
            ids = [first + i for i in range(length - 1)] + [1]
            rows.append(
                {
                    "input_ids": ids,
                    "labels": [-100, -100, *ids[2:]],
                    "length": length,
                    "first_label": 2,
                }
            )
        Dataset.from_list(rows).save_to_disk(str(folder / split))
    return folder


def plan(*, micro_batch: int, effective_batch_size: int, **changes: object) -> ExecutionPlan:
    fields: dict[str, object] = {"device_name": "CPU", "memory_cap_bytes": GIB, **changes}
    return execution_plan(micro_batch=micro_batch, effective_batch_size=effective_batch_size, **fields)


def settings(**changes: object) -> TrainingSettings:
    fields: dict[str, object] = {
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "effective_batch_size": 8,
        "seq_len": 12,
        "method": Method.FULL,
        "optimizer": "adamw_torch",
        "adapter": None,
        "num_train_examples": 64,
        "max_grad_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "seed": 0,
    }
    return TrainingSettings(**{**fields, **changes})  # type: ignore[arg-type]


def lora(**changes: object) -> TrainingSettings:
    return settings(
        method=Method.LORA, adapter=AdapterSettings(rank=4, alpha=8.0, targets="all-linear"), **changes
    )


def pinned(data_dir: Path, **changes: object) -> PinnedSettings:
    from datasets import load_from_disk

    fields: dict[str, object] = {
        "precision": Precision.FP32,
        "tf32": False,
        "attention": "sdpa",
        "eval_seq_len": EVAL_SEQ_LEN,
        "eval_micro_batch": 4,
        "eval_fingerprint": eval_fingerprint(load_from_disk(str(data_dir / "eval")), EVAL_SEQ_LEN),
        "num_evaluations": 4,
    }
    return PinnedSettings(**{**fields, **changes})  # type: ignore[arg-type]


def job(model: Path, data_dir: Path, output: Path, **changes: object) -> TrialJob:
    fields: dict[str, object] = {
        "study": "small",
        "trial": 0,
        "attempt": 1,
        "model": str(model),
        "data_dir": str(data_dir),
        "output_dir": str(output),
        "settings": settings(),
        "pinned": pinned(data_dir),
        "plan": plan(micro_batch=8, effective_batch_size=8),
        "device_uuids": ("CPU-test",),
        "resume_from": None,
        "save_resume_state": True,
        "trust_remote_code": False,
    }
    return TrialJob(**{**fields, **changes})  # type: ignore[arg-type]
