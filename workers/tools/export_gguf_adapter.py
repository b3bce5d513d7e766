"""Convert a LoRA adapter to a GGUF file of its own, and compare it on its base with peft.

`python -m autosft.workers.tools.export_gguf_adapter CHECKPOINT FILE DTYPE BASE [--trust-remote-code]`, in a
separate process.  Prints a line for each note on the result.

llama.cpp applies alpha / rank, with one alpha for the whole file, and its converter reads neither rslora's
scale nor `alpha_pattern`.  What is converted is therefore a copy whose alpha is the rank times the scale that
peft applied; layers with another scale have the difference in their B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG
from autosft.profiles.model.gguf import plain_folder
from autosft.workers.load_weights import load_adapter, load_base
from autosft.workers.tools import gguf_engine
from autosft.workers.tools.export_gguf import NOT_COMPARED, prepared, require_alike, require_family, said_of
from autosft.workers.tools.gguf_compare import NUM_LIKELIEST, compare, logits_after, rows_of
from autosft.workers.tools.gguf_converter import convert
from autosft.workers.tools.gguf_engine import Asked, ask
from autosft.workers.tools.merge_adapter import is_on_tied_weights
from autosft.workers.tools.scratch import scratch_folder, stopped_by_signals
from autosft.workers.tools.shared_files import share_as_folder

if TYPE_CHECKING:
    from peft import PeftModel

#: How much what the adapter changes may differ, as a share of it: root mean square of log-probabilities over
#: the base's.  16-bit files round each factor to 1 in 256 (bf16) or 1 in 2048 (f16).
EFFECT_TOLERANCE = {"f32": 0.02, "f16": 0.02, "bf16": 0.05}
#: Of the logits' spread: what llama.cpp's arithmetic differs by in fp32 (3e-5 for SmolLM2), and twice that,
#: below which an effect is not compared.
_ROUNDING = 1e-4
_SMALLEST_EFFECT = 2 * _ROUNDING
TEMPLATE = "chat_template.jinja"
MERGE = "Use --format gguf, which merges the adapter into its base."


def export_gguf_adapter(
    checkpoint: str, file: Path, *, dtype: str, base: str, trust_remote_code: bool = False
) -> list[str]:
    """Convert an adapter, with its chat template beside it if the base has another; return notes on it.

    The base is converted as f32 for the comparison, into the same folder for the time being: 4 bytes a
    parameter.  Raises UserError if the adapter on its base differs in llama.cpp, and leaves no file.
    """
    place = plain_folder(base)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    of_base = load_tokenizer(place, trust_remote_code=trust_remote_code)
    if tokenizer.get_vocab() != of_base.get_vocab():
        raise UserError(
            f"{checkpoint} has {len(tokenizer)} tokens and its base {len(of_base)}: an adapter's file has no "
            "tokens of its own.",
            remedy=MERGE,
        )
    template = tokenizer.chat_template if tokenizer.chat_template != of_base.chat_template else None
    require_family(place, base=place, trust_remote_code=trust_remote_code)
    with scratch_folder(file.parent, ".converting-") as scratch:
        model = load_base(place, dtype="float32", trust_remote_code=trust_remote_code).eval()
        rows = rows_of(model.config, model.get_output_embeddings().weight.shape[0])
        before = [logits_after(model, row) for row in rows]
        adapted = load_adapter(model, checkpoint).eval()
        written = write_scaled(adapted, scratch / "adapter", checkpoint)
        source = prepared(Path(place), scratch / "folder", of_base, base=place)
        unfinished = scratch / "adapter.gguf"
        convert(source, unfinished, dtype=dtype, adapter=written)
        if gguf_engine.is_here():
            whole = scratch / "base.gguf"
            convert(source, whole, dtype="f32")
            found = compare(
                adapted, tokenizer, whole, dtype=dtype, rows=rows, adapter=unfinished, chat_template=template
            )
            what = "the adapter's GGUF file is not the adapter that was trained"
            require_alike(found, what, remedy=MERGE)
            after = [logits_after(adapted, row) for row in rows]
            effect, notes = effect_apart(whole, unfinished, rows, before, after)
            if not effect <= EFFECT_TOLERANCE[dtype]:
                raise UserError(
                    f"{what}: what it changes differs by {effect:.2g} of itself, more than "
                    f"{EFFECT_TOLERANCE[dtype]:g}.",
                    remedy=MERGE,
                )
            notes = [said_of(found, dtype), *notes, *found.notes]
        else:
            notes = [NOT_COMPARED]
        if template is not None:
            (file.parent / TEMPLATE).write_text(template, encoding="utf-8")
        unfinished.rename(file)
    share_as_folder(file.parent)
    return notes


def write_scaled(adapted: PeftModel, folder: Path, checkpoint: str) -> Path:
    """Write an adapter's factors into a folder for the converter, with the scale that peft applies.

    Raises UserError for layers that have more than two factors and a scale.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_on_tied_weights(adapted):
        raise UserError(
            f"the adapter in {checkpoint} is on embeddings that are tied to the output head, where llama.cpp "
            "applies it to one of them only.",
            remedy=MERGE,
        )
    layers: dict[str, LoraLayer] = {}
    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or not {*module.lora_A, *module.lora_embedding_A}:
            raise UserError(f"{name} is not a layer with a LoRA adapter.", remedy=MERGE)
        layers[name] = module
    alphas = {name: layer.scaling["default"] * layer.r["default"] for name, layer in layers.items()}
    [(alpha, _)] = Counter(alphas.values()).most_common(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        more = alphas[name] / alpha
        for factor, value in factors_of(layer).items():
            scaled = value * more if factor.startswith(("lora_B", "lora_embedding_B")) else value
            tensors[f"{name}.{factor}"] = scaled.detach().float().contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "lora_alpha": alpha, "r": next(iter(layers.values())).r["default"]}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return folder


def factors_of(layer: Any) -> Mapping[str, torch.Tensor]:
    """Return a layer's A and B by the names that peft writes."""
    if "default" in layer.lora_A:
        return {f"{name}.weight": getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B")}
    names = ("lora_embedding_A", "lora_embedding_B")
    return {name: getattr(layer, name)["default"] for name in names}


def effect_apart(
    base: Path,
    adapter: Path,
    rows: Sequence[Sequence[int]],
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
) -> tuple[float, list[str]]:
    """Return how far what an adapter changes in llama.cpp is from what it changes in peft, and notes.

    The largest over the rows: root mean square of the differences of log-probabilities, over that of the
    changes themselves.  `before` and `after` are peft's logits (vocabulary).
    """
    asked = Asked(rows=tuple(tuple(row) for row in rows), num_likeliest=min(NUM_LIKELIEST, len(before[0])))
    plain = ask(base, asked).log_probabilities
    changed = ask(base, replace(asked, adapter=str(adapter))).log_probabilities
    largest, smallest = 0.0, False
    for was, now, engine_was, engine_now in zip(before, after, plain, changed, strict=True):
        both = [token for token in engine_now if token in engine_was and token < len(was)]
        wanted = (torch.log_softmax(now, dim=-1) - torch.log_softmax(was, dim=-1))[both]
        found = torch.tensor([engine_now[token] - engine_was[token] for token in both])
        size, apart = (float(values.pow(2).mean().sqrt()) for values in (wanted, found - wanted))
        spread = float((was - was.mean()).pow(2).mean().sqrt())
        if size < _SMALLEST_EFFECT * spread:
            smallest = True
            continue
        largest = max(largest, max(0.0, apart - _ROUNDING * spread) / size)
    said = "What the adapter changes is too small to be compared in llama.cpp." if smallest else ""
    return largest, [said or f"What the adapter changes is the same within {largest:.1g} of itself."]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "file", "dtype", "base"):
        parser.add_argument(name)
    parser.add_argument("--trust-remote-code", action="store_true")
    given = vars(parser.parse_args(arguments))
    checkpoint, file = given.pop("checkpoint"), Path(given.pop("file"))
    try:
        with stopped_by_signals():
            notes = export_gguf_adapter(checkpoint, file, **given)
    except UserError as error:
        # To the command that started it, which reads the last two lines.
        print(f"{error.message}\n{error.remedy or MERGE}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    print("\n".join(notes))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
