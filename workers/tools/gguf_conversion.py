"""Run llama.cpp's converter: `python -m autosft.workers.tools.gguf_conversion FOLDER FILE DTYPE [ADAPTER]`.

With the folder of an adapter, the adapter on the folder's model is converted.
Imports the converter's own `gguf`, not the installed one.  The converter recognises pre-tokenizers by the
token ids of one text, and so rejects a known pre-tokenizer with another vocabulary; it is then determined
from tokenizer.json (`_WAYS`).  The comparison that follows checks whether that is correct.
"""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

from autosft.workers.tools.gguf_converter import ADAPTERS, MODELS, require_converter

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
#: llama.cpp's names of pre-tokenizers, by the regular expression in tokenizer.json.
_WAYS = {
    _LLAMA3: "llama-bpe",
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
}


def way_to_split(pre_tokenizer: Any) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer of tokenizer.json, None for an unknown one."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if (
        kinds == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits")
        and steps[1].get("use_regex", True)
    ):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        return _WAYS.get(pattern) if steps[0]["behavior"] == "Isolated" else None
    return None


#: Kinds of layers by the names that the converter knows, of families whose names it compares.
_OLD_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
_NAMED_KINDS = ("granitemoehybrid", "nemotron_h")
#: Fields of experts, which Nemotron H has without any, too.
_OF_EXPERTS = (
    *("num_experts_per_tok", "n_routed_experts", "num_local_experts", "n_shared_experts"),
    *("n_group", "topk_group"),
)
#: Nemotron H's layers as its original configurations wrote them; of a list the converter knows no dense ones.
_PATTERN = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def with_old_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Add or rename the configuration fields that the converter reads and transformers 5 no longer has."""
    kind = str(fields.get("model_type"))
    rope = fields.get("rope_parameters") or {}
    by_kind: dict[str, dict[str, Any]] = {
        "gpt2": {"n_ctx": fields.get("n_positions")},
        "gpt_neox": {
            "rotary_pct": rope.get("partial_rotary_factor"),
            "rotary_emb_base": rope.get("rope_theta"),
        },
        "bloom": {"seq_length": 2048},  # else it takes the width for the context
        "cohere2": {"rotary_pct": rope.get("partial_rotary_factor", 1.0)},
        "bamba": {"attn_rotary_emb": _rotated(fields, rope)},
        "deepseek_v3": {"scoring_func": "sigmoid"},  # else softmax
        "glm4_moe_lite": {"scoring_func": "sigmoid", "first_k_dense_replace": _leading_dense(fields)},
    }
    missing = by_kind.get(kind, {})
    whole = {**{name: value for name, value in missing.items() if value is not None}, **fields}
    for name in ("layer_types", "layers_block_type") if kind in _NAMED_KINDS else ():
        if whole.get(name):
            whole[name] = [_OLD_KINDS.get(layer, layer) for layer in whole[name]]
    if kind == "nemotron_h" and "hybrid_override_pattern" not in whole:
        layers = whole.get("layers_block_type") or whole.get("layer_types") or ()
        whole["hybrid_override_pattern"] = "".join(_PATTERN[layer] for layer in layers)
        if "moe" not in layers:  # else it writes experts that no layer has
            for name in _OF_EXPERTS:
                whole.pop(name, None)
    return whole


def _leading_dense(fields: dict[str, Any]) -> int | None:
    """Return how many layers come before the first one with experts, None if they are not listed."""
    kinds = fields.get("mlp_layer_types")
    return len(list(itertools.takewhile(lambda kind: kind == "dense", kinds))) if kinds else None


def _rotated(fields: dict[str, Any], rope: dict[str, Any]) -> int | None:
    """Return how many values of a head are rotated, where a configuration has a share of them."""
    share, heads = rope.get("partial_rotary_factor"), fields.get("num_attention_heads")
    if share is None or not heads:
        return None
    return int(share * (fields.get("head_dim") or fields["hidden_size"] // heads))


def permuted(weights: Any, n_head: int, n_head_kv: int | None, num_rotated: int) -> Any:
    """Return query or key weights with the rotated values of each head in llama.cpp's order.

    It rotates neighbours where transformers rotates halves.  The converter's own `permute` takes all values
    of a head for rotated, and so mixes those of Bamba, which rotates half of them.
    """
    import torch

    heads = n_head if n_head_kv is None else n_head_kv
    by_head = weights.reshape(heads, weights.shape[0] // heads, *weights.shape[1:])
    rotated, rest = by_head[:, :num_rotated], by_head[:, num_rotated:]
    pairs = rotated.reshape(heads, 2, num_rotated // 2, *weights.shape[1:]).swapaxes(1, 2)
    return torch.cat([pairs.reshape(rotated.shape), rest], dim=1).reshape(weights.shape)


def _predicts_more_tokens(conversion: Any, folder: Path) -> bool:
    """Whether the converter looks for layers of multi-token prediction."""
    try:
        hparams = conversion.ModelBase.load_hparams(folder, False)
        name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        return bool(getattr(conversion.get_model_class(name), "supports_mtp_export", False))
    except (NotImplementedError, KeyError, IndexError):  # said again when it converts
        return False


def main(folder: str, file: str, dtype: str, adapter: str | None = None) -> None:
    script = MODELS if adapter is None else ADAPTERS
    place = require_converter(script)
    sys.path[:0] = [str(place), str(place / "gguf-py")]
    import conversion  # type: ignore[import-not-found]

    known = conversion.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(model: Any, tokenizer: Any) -> str:
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            path = Path(folder) / "tokenizer.json"
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            way = way_to_split(values.get("pre_tokenizer"))
            if way is None:
                raise NotImplementedError(
                    "llama.cpp does not know how this tokenizer splits words (tokenizer.ggml.pre)"
                ) from None
            return way

    read = conversion.ModelBase.load_hparams

    def load_hparams(*given: Any, **named: Any) -> dict[str, Any]:
        return with_old_names(read(*given, **named))

    fields = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    num_rotated = _rotated(fields, fields.get("rope_parameters") or {})
    if fields.get("model_type") == "bamba" and num_rotated:
        from conversion import llama

        llama.LlamaModel.permute = staticmethod(partial(permuted, num_rotated=num_rotated))
    conversion.TextModel.get_vocab_base_pre = get_vocab_base_pre
    conversion.ModelBase.load_hparams = staticmethod(load_hparams)
    sys.argv = [script, "--outfile", file, "--outtype", dtype]
    if adapter is not None:
        sys.argv += ["--base", folder, adapter]
    else:
        sys.argv.append(folder)
        if _predicts_more_tokens(conversion, Path(folder)):
            sys.argv.append("--no-mtp")  # layers that transformers' classes do not have
    runpy.run_path(str(place / script), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
