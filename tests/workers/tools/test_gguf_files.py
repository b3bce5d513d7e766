"""A model that llama.cpp would run as another one is not handed over: each known case."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from autosft.profiles.errors import UserError
from autosft.workers.tools import gguf_converter, gguf_engine
from autosft.workers.tools.export_gguf import family, require_family
from autosft.workers.tools.gguf_compare import Comparison
from autosft.workers.tools.gguf_conversion import permuted, way_to_split, with_old_names
from autosft.workers.tools.tiny_twin import first_layers
from tests.sampling import sample_of
from tests.workers.tools.tiny_tokenizers import CHATML, byte_level_tokenizer, sentencepiece_tokenizer

needs_llama_cpp = pytest.mark.skipif(
    gguf_converter.home() is None or not gguf_engine.is_here(),
    reason=f"llama.cpp is not here: pip install 'autosft[gguf]', then {gguf_converter.GET_IT}",
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration, the tokenizer that it comes with, and what must be said of it ("": it is right)."""

    name: str
    said: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "byte-level"
    template: str | None = None


CASES = [
    Case(name="Llama"),
    Case(name="Llama with sentencepiece", tokenizer="sentencepiece", config={"vocab_size": 400}),
    Case(
        name="Llama with sentencepiece without tokenizer.model",
        tokenizer="sentencepiece without tokenizer.model",
        config={"vocab_size": 400},
        said="texts have other token ids",
    ),
    Case(
        name="Qwen 2 with a tokenizer of its own",
        config={"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        tokenizer="qwen2",
    ),
    Case(
        name="a way to split that llama.cpp has not",
        tokenizer="odd",
        said="does not know how this tokenizer splits words",
    ),
    Case(name="Llama with gelu", config={"hidden_act": "gelu"}, said="probabilities differ"),
    Case(name="plain YaRN", config={"rope_parameters": {"rope_type": "yarn", **_ROPE}}),
    Case(
        name="YaRN with an attention factor",
        config={"rope_parameters": {"rope_type": "yarn", "attention_factor": 0.7, **_ROPE}},
        said="probabilities differ",
    ),
    Case(
        name="dynamic RoPE",
        config={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        said="does not take a prompt of 88 tokens",
    ),
    Case(
        name="Mistral's sliding window",
        config={"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
        said="probabilities differ after 56 tokens",
    ),
    Case(
        name="Mistral without a window",
        config={"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    ),
    Case(
        name="Qwen 3 MoE whose weights of experts are not made to sum to one",
        config={
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False,
        },
        tokenizer="qwen2",
        said="probabilities differ",
    ),
    Case(
        name="Qwen 3 MoE",
        config={
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        },
        tokenizer="qwen2",
    ),
    Case(
        name="gpt-oss",
        config={
            "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "head_dim": 16,
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        said="probabilities differ",
    ),
    Case(
        name="Bamba, which rotates half of a head",
        config={
            "model_type": "bamba", "architectures": ["BambaForCausalLM"], "attn_layer_indices": [1],
            "mamba_n_groups": 1, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    Case(
        name="a template that prints a dict",
        template=CHATML + "{% if tools %}{{ tools[0] }}{% endif %}",
        said="tools is rendered otherwise",
    ),
    Case(name="a template with the date", template="{{ strftime_now('%Y') }}" + CHATML),
    Case(
        name="GPT-2",
        config={"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2,
                "n_head": 4, "n_positions": 512},
    ),
    Case(name="GPT-NeoX", config={"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}),
    Case(name="Cohere 2", config={"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"],
                                  "head_dim": 16, "sliding_window": 32}),
]  # fmt: skip

#: One of each kind: another tokenizer, another forward, another template, another layout of the weights.
SAMPLE = {
    "Llama with sentencepiece without tokenizer.model",
    "Qwen 2 with a tokenizer of its own",
    "YaRN with an attention factor",
    "Mistral's sliding window",
    "Qwen 3 MoE",
    "Bamba, which rotates half of a head",
    "a template that prints a dict",
    "GPT-2",
}

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def folder_of(case: Case, folder: Path) -> Path:
    """Write a configuration and a tokenizer, as a model's folder has them."""
    folder.mkdir(parents=True)
    if case.tokenizer.startswith("sentencepiece"):
        sentencepiece_tokenizer(folder, keeps_model="without" not in case.tokenizer)
    else:
        patterns = {"qwen2": QWEN2, "odd": r"\p{L}+|\p{N}{2}|[^\p{L}\p{N}]"}
        byte_level_tokenizer(folder, pattern=patterns.get(case.tokenizer))
    if case.template is not None:
        (folder / "chat_template.jinja").write_text(case.template)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **case.config}))
    return folder


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("case", sample_of(CASES, SAMPLE))
def test_a_family_is_correct_in_llama_cpp_or_differences_are_reported(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = family(str(folder_of(case, tmp_path / "model")), base=None)
    said = found if isinstance(found, str) else "; ".join(found.differences)
    if not case.said:
        assert said == ""
        assert isinstance(found, Comparison)
        assert found.num_texts >= 200
    assert case.said in said
    if case.said:
        with pytest.raises(UserError, match=case.said):  # from the cache
            require_family(str(tmp_path / "model"), base=None)


@pytest.mark.parametrize(
    ("pattern", "depth", "kept"),
    [("sssssf", 30, 6), ("f", 30, 2), ("sf", 30, 3), ("fs", 4, 3)],
)
def test_a_small_model_has_the_first_layers_in_their_order(pattern: str, depth: int, kept: int) -> None:
    names = {"s": "sliding_attention", "f": "full_attention"}
    types = [names[pattern[i % len(pattern)]] for i in range(depth)]
    config = {
        **LLAMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16,
        "sliding_window": 32, "num_hidden_layers": depth, "layer_types": types,
    }  # fmt: skip
    cut = first_layers(json.dumps(config))
    assert cut["num_hidden_layers"] == kept
    assert cut["layer_types"] == types[:kept]


def test_the_converter_gets_the_names_that_it_knows() -> None:
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]}
    assert with_old_names(hybrid)["layer_types"] == ["mamba", "attention"]
    other = {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}
    assert with_old_names(other) == other
    assert with_old_names({"model_type": "gpt2", "n_positions": 64})["n_ctx"] == 64
    assert with_old_names({"model_type": "gpt2", "n_positions": 64, "n_ctx": 32})["n_ctx"] == 32


def test_the_converter_gets_the_layers_of_nemotron_h_as_they_were_written() -> None:
    layers = ["linear_attention", "mlp", "full_attention", "mlp"]
    dense = with_old_names(
        {"model_type": "nemotron_h", "layers_block_type": layers, "num_experts_per_tok": 2}
    )
    assert dense["hybrid_override_pattern"] == "M-*-"
    assert "num_experts_per_tok" not in dense, "a dense model is taken for one of experts by it"
    experts = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe"], "num_experts_per_tok": 2}
    assert with_old_names(experts)["hybrid_override_pattern"] == "ME"
    assert with_old_names(experts)["num_experts_per_tok"] == 2


def test_the_converter_gets_how_experts_are_chosen() -> None:
    assert with_old_names({"model_type": "deepseek_v3"})["scoring_func"] == "sigmoid"
    glm = with_old_names(
        {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "dense", "sparse", "dense"]}
    )
    assert (glm["scoring_func"], glm["first_k_dense_replace"]) == ("sigmoid", 2)
    assert "first_k_dense_replace" not in with_old_names({"model_type": "glm4_moe_lite"})


def test_the_converter_gets_the_part_of_a_head_that_bamba_rotates() -> None:
    bamba = {"model_type": "bamba", "hidden_size": 64, "num_attention_heads": 4}
    assert (
        with_old_names({**bamba, "rope_parameters": {"partial_rotary_factor": 0.5}})["attn_rotary_emb"] == 8
    )
    assert "attn_rotary_emb" not in with_old_names(bamba)


WAYS = {
    "GPT-2's": ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
    "with digits apart": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "use_regex": True},
            ],
        },
        "smollm",
    ),
    "Qwen's": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"},
                {"type": "ByteLevel", "use_regex": False},
            ],
        },
        "qwen2",
    ),
    "another": ({"type": "Whitespace"}, None),
    "none": (None, None),
}


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_only_rotated_values_of_a_head_change_their_places(num_kv_heads: int | None) -> None:
    num_heads = 4 if num_kv_heads is None else num_kv_heads
    weights = torch.arange(num_heads * 8.0).unsqueeze(1)  # of heads of 8, of which 4 are rotated
    found = permuted(weights, 4, num_kv_heads, num_rotated=4).reshape(num_heads, 8)
    for head in range(num_heads):
        assert (found[head] - 8 * head).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", WAYS)
def test_the_pre_tokenizer_is_determined_from_the_tokenizer(name: str) -> None:
    pre_tokenizer, way = WAYS[name]
    assert way_to_split(pre_tokenizer) == way


def test_a_missing_converter_is_reported_with_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_converter, "_places", lambda: (tmp_path / "nowhere",))
    monkeypatch.setattr(gguf_converter, "_NEEDED", ())
    with pytest.raises(UserError, match=r"-m autosft\.workers\.tools\.gguf_converter"):
        gguf_converter.require_converter()
    monkeypatch.setattr(gguf_converter, "_NEEDED", ("no_such_package",))
    with pytest.raises(UserError, match="pip install"):
        gguf_converter.require_converter()
