"""Merge an adapter into its base model's weights, and check that the merged model equals the adapted one.

`python -m autosft.workers.tools.merge_adapter CHECKPOINT OUTPUT [--base BASE] [--dtype DTYPE] ...`; without a
base, CHECKPOINT is a whole model, which is written in another dtype.

Prints a line for everything unexpected about the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.dataset.turn_end import set_turn_end
from autosft.profiles.errors import UserError
from autosft.workers.load_weights import load_adapter, load_base
from autosft.workers.tools.scratch import scratch_folder, stopped_by_signals
from autosft.workers.tools.shared_files import copy_tokenizer_model, share_as_folder
from autosft.workers.training.zero_masks import ZeroMasks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

#: How much logits may differ, as a share of their spread (root mean square of both).  Merging in fp32 rounds;
#: weights stored in 16 bits are rounded again, bf16's to 1 in 256.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_NUM_EXAMPLES, _NUM_TOKENS = 4, 32


def merge(
    checkpoint: str,
    output: str,
    base: str,
    *,
    dtype: str | None = None,
    keep_zeros: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write the merged model and the checkpoint's tokenizer into folder `output`; return notes for the user.

    Merges on the CPU, in `dtype`, by default that of the base's stored weights.  A QLoRA adapter,
    which was trained on 4-bit weights, is merged into the full weights too; the result differs by their
    rounding.

    Logits of the merged model are compared with those of the adapter on its base, on a few rows of tokens, in
    memory and again after saving (`TOLERANCE`).  Raises UserError if they differ; `output` then stays empty.

    Merging into tied embeddings unties them, since the sum would change the output head as well.  W + B A is
    dense even for a sparse W: with `keep_zeros`, zeros of the base stay zero in the merged model, which then
    is as sparse but not exactly the trained one; raises UserError for a base without zeros.
    """
    notes: list[str] = []
    model = load_base(base, dtype="auto", trust_remote_code=trust_remote_code)
    stored = model.dtype if dtype is None else getattr(torch, dtype)
    masks = ZeroMasks(model) if keep_zeros else None
    # Summed in fp32: a small update would vanish in 16 bits before it is added.
    adapted = load_adapter(model.to(torch.float32), checkpoint).eval()
    require_weights_of_their_own(adapted, checkpoint)
    if is_on_tied_weights(adapted):
        untie(model)
        notes.append(
            "The adapter is on embeddings that are tied to the output head: the merged model has a head of "
            "its own (tie_word_embeddings is false in its config.json)."
        )
    rows = example_rows(model)
    wanted = logits_of(adapted, rows)
    merged = adapted.merge_and_unload()
    require_close(wanted, logits_of(merged, rows), TOLERANCE[torch.float32], checkpoint)
    if masks is not None:
        masks.clear_weights()
        wanted = logits_of(merged, rows)
    del adapted
    _write(
        merged,
        checkpoint,
        output,
        dtype=stored,
        wanted=wanted,
        base=base,
        trust_remote_code=trust_remote_code,
    )
    return notes


def rewrite(checkpoint: str, output: str, *, dtype: str, trust_remote_code: bool = False) -> list[str]:
    """Write a whole model and its tokenizer into folder `output` in another dtype; return notes for the user.

    The result is compared like a merged model.
    """
    model = load_base(checkpoint, dtype="auto", trust_remote_code=trust_remote_code)
    was, stored = model.dtype, getattr(torch, dtype)
    model.to(torch.float32)
    wanted = logits_of(model, example_rows(model))
    _write(
        model, checkpoint, output, dtype=stored, wanted=wanted, base=None, trust_remote_code=trust_remote_code
    )
    return (
        [f"Weights are {dtype}; they were trained in {str(was).removeprefix('torch.')}."]
        if was != stored
        else []
    )


def _write(
    model: PreTrainedModel,
    checkpoint: str,
    output: str,
    *,
    dtype: torch.dtype,
    wanted: torch.Tensor,
    base: str | None,
    trust_remote_code: bool,
) -> None:
    """Save a model with the checkpoint's tokenizer, after checking that it loads with the same logits.

    Raises UserError if its logits differ from `wanted`; `output` then stays empty.
    """
    model.to(dtype)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    set_turn_end(model, tokenizer)
    Path(output).mkdir(parents=True, exist_ok=True)
    rows = example_rows(model)
    with scratch_folder(Path(output), ".merging-") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        copy_tokenizer_model(unfinished, checkpoint, base)
        model.to("meta")  # its memory is the saved one's now
        saved = load_base(str(unfinished), dtype=torch.float32, trust_remote_code=trust_remote_code)
        require_close(wanted, logits_of(saved, rows), TOLERANCE.get(dtype, 5e-2), checkpoint)
        for path in unfinished.iterdir():
            shutil.move(path, Path(output) / path.name)
    share_as_folder(Path(output))


def is_on_tied_weights(adapted: PeftModel) -> bool:
    """Return whether an adapter changes embeddings or an output head that share one weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    if inside is None or head is None:
        return False
    weights = [item.get_base_layer() if isinstance(item, BaseTunerLayer) else item for item in (inside, head)]
    is_tied = weights[0].weight is weights[1].weight
    return is_tied and any(isinstance(item, BaseTunerLayer) for item in (inside, head))


def require_weights_of_their_own(adapted: PeftModel, checkpoint: str) -> None:
    """Raise UserError where adapted layers share one weight, which would get the sum of their changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [item.get_base_layer() for item in adapted.modules() if isinstance(item, BaseTunerLayer)]
    linear = [item for item in layers if isinstance(item, torch.nn.Linear)]
    if len({id(item.weight) for item in linear}) < len(linear):
        raise UserError(
            f"the adapter of {checkpoint} cannot be merged: layers of its base share one weight, and each "
            "has a change of its own to it.",
            remedy="Export the adapter without --merge; peft loads it with its base.",
        )


def untie(model: PreTrainedModel) -> None:
    """Give the output head a copy of the embeddings' weight, and update the configuration."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in {id(item): item for item in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def example_rows(model: PreTrainedModel) -> torch.Tensor:
    """Return arbitrary but fixed tokens to compare models on, (rows, tokens)."""
    drawn = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NUM_TOKENS
    return torch.randint(vocab_size, (_NUM_EXAMPLES, min(_NUM_TOKENS, longest)), generator=drawn)


def logits_of(model: PreTrainedModel | PeftModel, rows: torch.Tensor) -> torch.Tensor:
    """Return the logits after each token of the rows, (rows, tokens, vocabulary) in fp32."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    return logits.float()


def require_close(wanted: torch.Tensor, found: torch.Tensor, tolerance: float, checkpoint: str) -> None:
    """Raise UserError if logits differ by more than `tolerance` times their spread."""
    spread = float((wanted - wanted.mean(dim=-1, keepdim=True)).pow(2).mean().sqrt())
    apart = float((found - wanted).pow(2).mean().sqrt())
    if not apart <= tolerance * spread:
        raise UserError(
            f"the merged model is not the adapter of {checkpoint} on its base: their logits differ by "
            f"{apart / spread:.2g} of their spread, more than {tolerance:g}.",
            remedy="Export the adapter without --merge; peft loads it with its base.",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "output"):
        parser.add_argument(name)
    for name in ("--base", "--dtype"):
        parser.add_argument(name)
    parser.add_argument("--keep-zeros", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    given = vars(parser.parse_args())
    try:
        with stopped_by_signals():
            if given["base"] is None:
                del given["base"], given["keep_zeros"]
                said = rewrite(**given)
            else:
                said = merge(**given)
        print("\n".join(said))  # noqa: T201 - to the command that started it
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
