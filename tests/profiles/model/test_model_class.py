"""Which class trains a configuration, what of it text trains, and where adapters sit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families import BY_NAME

torch = pytest.importorskip("torch")

from autosft.profiles.model.adapted_layers import read_directly, targets_in  # noqa: E402 - needs torch
from autosft.profiles.model.model_class import (  # noqa: E402
    attention_heads,
    auto_class,
    build,
    config_of,
    depth_of,
    is_trainable,
    longest_position,
    other_towers,
    repeated_layers,
    width_of,
)


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return build(config_of(BY_NAME[name].config_json))


@pytest.mark.parametrize("name", ["Gemma 3 with vision", "Qwen 2.5 VL", "Qwen 3 VL"])
def test_of_a_vision_language_model_what_text_passes_through_is_trained(name: str) -> None:
    config = config_of(BY_NAME[name].config_json)
    config.architectures = [type(on_meta(name)).__name__]
    assert is_trainable(config)
    model = on_meta(name)
    assert auto_class(config).__name__ == "AutoModelForImageTextToText"
    frozen = {one for one, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all("vis" in item or "multi_modal_projector" in item for item in frozen)
    assert not any("language_model" in item or "lm_head" in item for item in frozen)


def test_a_text_model_is_trained_whole() -> None:
    model = on_meta("Llama")
    assert other_towers(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_backbone_has_the_name_that_trl_looks_for() -> None:
    model = on_meta("Llama 4")
    assert model.base_model is model.model


TARGETS = [  # family, what "all-linear" leaves out, what it has
    ("Mamba", {"out_proj", "x_proj", "dt_proj"}, {"in_proj"}),
    ("Mamba 2", {"out_proj"}, {"in_proj"}),
    ("Falcon H1", {"out_proj"}, {"in_proj", "q_proj", "o_proj", "down_proj"}),
    ("Jamba", {"out_proj", "x_proj", "dt_proj"}, {"in_proj", "q_proj", "o_proj", "down_proj"}),
    ("Llama 4", {"router"}, {"q_proj", "o_proj", "gate_proj"}),
    ("Qwen 3 VL", {"qkv", "linear_fc1"}, {"q_proj", "o_proj", "down_proj"}),
]


@pytest.mark.parametrize(("name", "without", "having"), TARGETS, ids=[case[0] for case in TARGETS])
def test_all_linear_means_what_trains(name: str, without: set[str], having: set[str]) -> None:
    targets = targets_in(on_meta(name), "all-linear")
    assert isinstance(targets, list)
    last = {target.rpartition(".")[2] for target in targets}
    assert not last & (without | {"lm_head"})
    assert having <= last


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "DeepSeek V3", "Qwen 3.5", "BLOOM"])
def test_where_nothing_is_left_out_peft_finds_the_layers_itself(name: str) -> None:
    model = on_meta(name)
    assert targets_in(model, "all-linear") == "all-linear"
    assert targets_in(model, ("q_proj",)) == ["q_proj"]
    assert [*read_directly(model)] == []


SHAPES = [  # family, attention heads, of keys and values, their size, longest position, layers
    ("Llama", (4, 2, 16), 512, 6),
    ("MiniCPM 3", (4, 4, 24), 512, 6),
    ("Gemma 4", (4, 2, 32), 512, 6),
    ("Mamba", (0, 0, 0), 0, 6),
    ("Mamba 2", (0, 0, 0), 0, 6),
    ("RWKV", (0, 0, 0), 512, 6),
    ("BLOOM", (4, 4, 16), 0, 6),
    ("MPT", (4, 4, 16), 0, 6),
    ("GPT-2", (4, 4, 16), 512, 6),
    ("Nemotron H", (4, 2, 16), 512, 8),
]


@pytest.mark.parametrize(("name", "heads", "longest", "depth"), SHAPES, ids=[case[0] for case in SHAPES])
def test_fields_of_a_configuration_are_read_under_any_name(
    name: str, heads: tuple[int, int, int], longest: int, depth: int
) -> None:
    config = config_of(BY_NAME[name].config_json)
    text = config.get_text_config()
    assert attention_heads(text) == heads
    assert longest_position(text) == longest
    assert depth_of(config) == depth == len(repeated_layers(on_meta(name)))


def test_a_folders_own_classes_are_built_where_they_are_trusted(tmp_path: Path) -> None:
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    values = {**BY_NAME["Llama"].config, "model_type": "own", "auto_map": own, "_name_or_path": str(tmp_path)}
    config = config_of(json.dumps(values), trust_remote_code=True)
    with torch.device("meta"):
        model = build(config, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert len(repeated_layers(model)) == 6
    with pytest.raises(ValueError, match="own"):
        config_of(json.dumps(values))


def test_a_configuration_with_names_of_its_own_is_no_fault() -> None:
    """transformers takes for granted that the number of layers is `num_hidden_layers`."""
    from transformers import PreTrainedConfig

    class OwnNames(PreTrainedConfig):
        model_type = "own_names"

        def __init__(self, dim: int = 32, depth: int = 2, **others: Any) -> None:
            self.dim, self.depth = dim, depth
            super().__init__(**others)

    config = OwnNames()
    assert attention_heads(config) == (0, 0, 0)
    assert (width_of(config), depth_of(config), longest_position(config)) == (32, None, 0)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 3 MoE", "gpt-oss", "Granite MoE", "Llama 4", "OLMoE"])
def test_trl_finds_the_number_of_experts_for_the_auxiliary_loss(name: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    config = config_of(BY_NAME[name].config_json)
    saved = set(config.to_dict())
    model = build(config)
    text = model.config.get_text_config()
    text.output_router_logits = True  # as SFTTrainer sets it where the coefficient is not 0
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    tokens = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(tokens)
    outputs = model(input_ids=tokens, attention_mask=mask, labels=tokens, fused_lm_head=True)
    assert outputs.aux_loss is not None
    assert 0 < float(outputs.aux_loss.detach()) < 100
    assert ("num_experts" in text.to_dict()) == ("num_experts" in saved)  # the alias is not saved
