"""Writes a LoRA adapter into its base's weights.

`python -m autosft.workers.tools.merge_adapter CHECKPOINT OUTPUT BASE [--keep-zeros]`
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.dataset.turn_end import set_turn_end
from autosft.workers.training.zero_masks import ZeroMasks


def merge(checkpoint: str, output: str, base: str, *, keep_zeros: bool = False) -> None:
    """Write the merged model and the checkpoint's tokenizer into folder `output`.

    On the CPU, in the precision that the base's weights are stored in; also for QLoRA, where the adapter was
    trained over 4-bit weights: merged into the full ones it differs by their rounding.

    W + B A is dense whatever W is.  With `keep_zeros` what is zero in the base is zero in the merged model,
    which then is as sparse, and not quite the one that was trained; UserError for a base without zeros.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    stored = model.dtype
    masks = ZeroMasks(model) if keep_zeros else None
    # The sum is taken in fp32: a small update would vanish in 16 bits before it is added.
    merged = PeftModel.from_pretrained(model.to(torch.float32), checkpoint).merge_and_unload()
    if masks is not None:
        masks.clear_weights()
    tokenizer = load_tokenizer(checkpoint)
    set_turn_end(merged, tokenizer)
    merged.to(stored).save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "output", "base"):
        parser.add_argument(name)
    parser.add_argument("--keep-zeros", action="store_true")
    merge(**vars(parser.parse_args()))
