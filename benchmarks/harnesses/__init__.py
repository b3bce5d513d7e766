"""Published benchmarks' own training loops, so that their measurements can be predicted.

Each module reproduces the loop of one source; tracing, extension to full depth, replay through the allocator
and bounds are the product's (autosft.profiles.memory).
"""

from __future__ import annotations

from harnesses import fsdp_qlora, litgpt, peft_metamath
from harnesses.prediction import NotPredictable, Prediction, Row

HARNESSES = {
    peft_metamath.SOURCE: peft_metamath,
    **dict.fromkeys(litgpt.SOURCES, litgpt),
    fsdp_qlora.SOURCE: fsdp_qlora,
}

#: Why rows of other sources are listed instead of predicted.
NOT_REPRODUCED = {
    "Liger-Kernel HF example": "lengths are packed by a collator that the source does not state",
    "PEFT README": "batch and length are not stated",
    "PEFT docs": "batch and length are not stated",
    "Qwen README profiling": "the model's own remote code (2023) with flash attention decides the peak",
    "axolotl examples": "the true lengths and the versions are not stated",
    "ms-swift Benchmark.md": "samples over the cap are dropped; the true lengths are not stated",
    "ms-swift Benchmark.md (tuners)": "samples over the cap are dropped; the true lengths are not stated",
    "torchtitan benchmarks": "FSDP2, compilation and float8 over many GPUs: versions are not stated",
    "torchtune": "torchtune's own models, lengths and versions are not stated",
    "transformers docs": "BERT is outside of the memory model's scope (causal language models)",
}


def predict(row: Row) -> Prediction:
    """Predict a row by its source's harness; raises NotPredictable with the reason."""
    harness = HARNESSES.get(row["source"])
    if harness is None:
        raise NotPredictable(
            NOT_REPRODUCED.get(row["source"], "the source's training loop is not reproduced")
        )
    return harness.predict(row)


def meta_model(row: Row) -> object:
    """Return the row's base model on the meta device, for estimators that only count parameters."""
    harness = HARNESSES.get(row["source"])
    if harness is None:
        raise NotPredictable("the source's training loop is not reproduced")
    return harness.meta_model(row)


__all__ = ["HARNESSES", "NotPredictable", "Prediction", "Row", "meta_model", "predict"]
