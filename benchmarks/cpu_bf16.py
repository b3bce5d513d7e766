"""Compare fp32 with bf16 autocast on this CPU: processor time of a step, and the losses of a short run.

    python benchmarks/cpu_bf16.py                       # a model of 23 million parameters, made on the spot
    python benchmarks/cpu_bf16.py --model FOLDER --steps 3

The same weights, batches (4 x 128 tokens of a counting task) and optimizer (AdamW at 3e-4) in both; one
thread, since processor time is what trials share.  Prints the seconds of forward and backward pass and of
the whole step, and the largest difference of the loss.  Exit code 1 where the losses differ by more than
--tolerance (relative), so that nobody trains in bf16 here without having seen that they agree.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0.02)
    given = parser.parse_args()
    import torch

    from autosft.profiles.hardware.host import profile_host

    torch.set_num_threads(1)
    print(
        f"{profile_host().name}, bf16 in hardware: {profile_host().supports_bf16}, torch {torch.__version__}"
    )
    runs = {name: run(given.model, given.steps, in_bf16=name == "bf16") for name in ("fp32", "bf16")}
    for name, (passes, steps, losses) in runs.items():
        passed, whole = statistics.median(passes), statistics.median(steps)
        print(f"{name}: {passed:.2f} s forward and backward, {whole:.2f} s a step (processor time, medians)")
        print(f"      loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    (fast, _, plain), (slow, _, rounded) = runs["fp32"], runs["bf16"]
    apart = max(abs(a - b) / a for a, b in zip(plain, rounded, strict=True))
    ratio = statistics.median(fast) / statistics.median(slow)
    print(f"bf16 is {ratio:.2f} times as fast; losses differ by at most {apart:.2%}")
    return int(apart > given.tolerance)


def run(folder: str | None, num_steps: int, *, in_bf16: bool) -> tuple[list[float], list[float], list[float]]:
    """Return processor seconds of both passes and of each step, and the losses."""
    import torch

    torch.manual_seed(0)
    model = load(folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    passes, steps, losses = [], [], []
    for step in range(num_steps):
        ids = (torch.arange(128) * 7 + torch.randint(0, 64, (4, 1))) % 512
        begun = time.process_time()
        precision = torch.autocast("cpu", torch.bfloat16) if in_bf16 else contextlib.nullcontext()
        with precision:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        passed = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first one warms up
            passes.append(passed - begun)
            steps.append(time.process_time() - begun)
        losses.append(loss.item())
    return passes, steps, losses


def load(folder: str | None) -> Any:
    """Load a model in fp32, or make a Llama of 23 million parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
