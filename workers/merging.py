"""Writes a LoRA adapter into its base's weights.

`python -m autosft.workers.merging CHECKPOINT OUTPUT BASE`
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def merge(checkpoint: str, output: str, base: str) -> None:
    """Write the merged model and the checkpoint's tokenizer into folder `output`.

    On the CPU, in the precision that the base's weights are stored in; also for QLoRA, where the adapter was
    trained over 4-bit weights: merged into the full ones it differs by their rounding.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    stored = model.dtype
    # The sum is taken in fp32: a small update would vanish in 16 bits before it is added.
    merged = PeftModel.from_pretrained(model.to(torch.float32), checkpoint).merge_and_unload()
    merged.to(stored).save_pretrained(output)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)


if __name__ == "__main__":
    merge(*sys.argv[1:])
