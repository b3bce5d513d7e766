"""Model profiles from folders, from the shipped table, and from a hub that is faked or out of reach."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from autosft.profiles.errors import UserError
from autosft.profiles.model.files import require_plausible
from autosft.profiles.model.profile import build_on_meta, load_config, load_model_profile

# Parameters as the hub states them for the repositories' safetensors, shared ones counted once.
KNOWN_PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-2-2b": 2_614_341_888,
    "Gemma-2-9b": 9_241_705_984,
    "Gemma-3-1b": 999_885_952,
    "Gemma-3-4b-text": 3_880_263_168,
    "Phi-3-mini-4k": 3_821_079_552,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Gemma-3-270m": 268_098_176,
    "Gemma-3-27b-text": 27_009_346_304,
    "SmolLM3-3B": 3_075_098_624,
    "Phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "LFM2-350M": 354_483_968,
    "LFM2-1.2B": 1_170_340_608,
    "gpt-oss-20b": 20_914_757_184,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Mistral-Small-24B": 23_572_403_200,
    "OLMo-2-7B": 7_298_617_344,
    "OLMo-3-7B": 7_298_011_136,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def llama(**given: Any) -> LlamaConfig:
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
    return LlamaConfig(**(values | given))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small model folder; copied, never changed."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama()).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "copy"))


# Folders


def test_a_folder(folder: Path) -> None:
    profile = load_model_profile(str(folder))
    assert profile.architecture == "LlamaForCausalLM"
    assert profile.num_parameters == profile.num_trainable == 106_816
    assert (profile.hidden_size, profile.num_layers, profile.vocab_size) == (64, 2, 256)
    assert (profile.num_attention_heads, profile.num_key_value_heads, profile.head_dim) == (4, 2, 16)
    assert profile.dtype == "float32"
    assert profile.has_weights
    assert profile.has_tokenizer
    assert profile.has_chat_template
    assert not profile.has_tied_embeddings
    assert profile.revision is None
    assert profile.note is None


def test_a_folder_is_read_quickly(folder: Path) -> None:
    load_model_profile(str(folder))  # imports
    started = time.process_time()
    load_model_profile(str(folder))
    assert time.process_time() - started < 2


def test_linear_groups_hold_every_weight_of_the_blocks(folder: Path) -> None:
    groups = {group.name: group for group in load_model_profile(str(folder)).linear_groups}
    assert set(groups) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (groups["k_proj"].in_features, groups["k_proj"].out_features, groups["k_proj"].count) == (
        64,
        32,
        2,
    )
    assert groups["down_proj"].num_weights == 2 * 128 * 64


def test_the_configuration_comes_back(folder: Path) -> None:
    profile = load_model_profile(str(folder))
    model = build_on_meta(load_config(profile))
    assert sum(p.numel() for p in model.parameters()) == profile.num_parameters
    assert model.device.type == "meta"


def test_tied_embeddings_and_half_precision(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama(tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "tied")
    profile = load_model_profile(str(tmp_path / "tied"), need_tokenizer=False)
    assert profile.has_tied_embeddings
    assert profile.num_parameters == 106_816 - 256 * 64
    assert profile.dtype == "bfloat16"
    assert not profile.has_tokenizer
    assert not profile.has_chat_template


def test_experts_count_for_the_share_that_a_token_meets(tmp_path: Path) -> None:
    MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path)
    groups = {g.name: g for g in load_model_profile(str(tmp_path), need_tokenizer=False).linear_groups}
    assert groups["down_proj"].active_share == 0.25
    assert groups["down_proj"].count == 2 * 8
    assert groups["q_proj"].active_share == 1


def test_conv1d_counts_as_linear(tmp_path: Path) -> None:
    GPT2Config(n_embd=64, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    profile = load_model_profile(str(tmp_path), need_tokenizer=False)
    assert [(g.name, g.out_features) for g in profile.linear_groups] == [
        ("c_attn", 192),
        ("c_proj", 64),
        ("c_fc", 256),
        ("c_proj", 64),
    ]
    assert profile.max_positions == 1024


# Fingerprints


def test_fingerprint_hangs_on_content_not_on_place(folder: Path, template: Path) -> None:
    assert load_model_profile(str(folder)).fingerprint == load_model_profile(str(template)).fingerprint


def test_fingerprint_sees_changed_weights_and_configuration(folder: Path) -> None:
    before = load_model_profile(str(folder)).fingerprint
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # same names, same shapes, same size
    weights.write_bytes(content)
    changed = load_model_profile(str(folder)).fingerprint
    assert changed != before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert load_model_profile(str(folder)).fingerprint not in (before, changed)


def test_fingerprint_of_large_files_samples_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosft.profiles.model.profile._check_weights", lambda *_: None)
    large = folder / "model.safetensors"
    save_file({"weight": torch.zeros(80 * 2**20, dtype=torch.int8)}, large)
    before = load_model_profile(str(folder)).fingerprint
    with large.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert load_model_profile(str(folder)).fingerprint != before


# Refusals


def config_of(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in (config | changes).items() if v is not None})
    )


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    no_config(folder)
    no_weights(folder)
    (folder / "adapter_config.json").write_text("{}")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def foreign_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def torn_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a header")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def classifier(folder: Path) -> None:
    config_of(folder, architectures=["LlamaForSequenceClassification"])


def encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )


def unknown_type(folder: Path) -> None:
    config_of(folder, model_type="warp")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def own_code(folder: Path) -> None:
    config_of(folder, model_type="warp", auto_map={"AutoConfig": "configuration_warp.WarpConfig"})


def impossible(folder: Path) -> None:
    config_of(folder, num_attention_heads=0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_config, "has no config.json"),
        (adapter, "an adapter on a base model that it does not name"),
        (no_tokenizer, "has no tokenizer"),
        (no_weights, "has no weights."),
        (foreign_weights, "known form, only model.gguf"),
        (torn_weights, "is not a safetensors file"),
        (missing_shard, "lacks 1 of its weight files: model-00001-of-00002.safetensors"),
        (classifier, "LlamaForSequenceClassification, not a causal language model"),
        (encoder_decoder, "T5ForConditionalGeneration, not a causal language model"),
        (unknown_type, "config.json cannot be read"),
        (broken_config, "config.json cannot be read"),
        (own_code, "contains code that has to be run"),
        (impossible, "config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_train_is_one_message(spoil: Any, words: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_model_profile(str(folder))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("spoil", [no_tokenizer, no_weights])
def test_planning_needs_the_shape_alone(spoil: Any, folder: Path) -> None:
    spoil(folder)
    assert load_model_profile(str(folder), need_tokenizer=False).num_parameters == 106_816


@pytest.mark.parametrize("source", ["./nowhere/model", "/nowhere", "a/b/c", "~/nowhere-at-all"])
def test_a_missing_folder(source: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_model_profile(source)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        load_model_profile(str(folder / "config.json"))


# The table of shapes and the hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fake_hub(monkeypatch, ConnectionError("no route to host"))


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def model_info(self: object, repo_id: str, **given: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.mark.parametrize("name", KNOWN_PARAMETERS)
def test_shapes_of_the_table_have_the_published_parameters(name: str) -> None:
    profile = load_model_profile(name, need_tokenizer=False)
    assert profile.num_parameters == KNOWN_PARAMETERS[name]
    assert not profile.has_weights
    assert profile.note is None or "experts share one weight" in profile.note


@pytest.mark.parametrize(
    ("name", "published", "encoders"),
    [
        ("Gemma-4-E2B-text", 5.1, 0.45),
        ("Gemma-4-E4B-text", 8.0, 0.45),
        ("Gemma-4-26B-A4B-text", 25.2, 0.0),
        ("Gemma-4-31B-text", 30.7, 0.0),
        ("Llama-4-Scout-text", 108.6, 0.9),
    ],
)
def test_text_towers_have_what_their_cards_state_less_the_encoders(
    name: str, published: float, encoders: float
) -> None:
    """In billions, as model cards round them; encoders of images and sound are no part of the table."""
    profile = load_model_profile(name, need_tokenizer=False)
    assert profile.num_parameters / 1e9 + encoders == pytest.approx(published, abs=0.1)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b"),
        ("unsloth/Llama-3.2-1B-Instruct", "Llama-3.2-1B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M"),
        ("google/gemma-2-2b-it", "Gemma-2-2b"),
    ],
)
def test_the_table_is_used_with_a_note_if_the_hub_is_out_of_reach(source: str, shape: str) -> None:
    profile = load_model_profile(source, need_tokenizer=False)
    assert profile.num_parameters == KNOWN_PARAMETERS[shape]
    assert profile.note is not None
    assert f"shape of {shape}" in profile.note
    with pytest.raises(UserError, match="only its shape"):
        load_model_profile(source)


@pytest.mark.usefixtures("offline")
def test_out_of_reach_and_unknown() -> None:
    with pytest.raises(UserError, match="cannot be reached") as caught:
        load_model_profile("someone/warp-7b", need_tokenizer=False)
    assert "SmolLM2-135M" in (caught.value.remedy or "")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instuct", "HuggingFaceTB/SmolLM2-135M"),
        ("Qwen/Qwen3-0.6", "Qwen/Qwen3-0.6B"),
        ("meta-lama/Lama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ],
)
def test_a_mistyped_name_names_the_nearest_known(typed: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model_profile(typed, need_tokenizer=False)
    assert (caught.value.remedy or "").partition("Nearest of the known models: ")[2].startswith(meant)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", b"GGML", "is a file, and not a GGUF file"),
        ("chats.jsonl", b"{}", "is a file, and not a GGUF file"),
        ("folder", None, "has no config.json"),
        ("no such/folder/here", "", "there is no such folder"),
    ],
)
def test_what_cannot_be_a_model_is_told_by_its_path(
    name: str, content: bytes | str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.mkdir()
    with pytest.raises(UserError, match=words):
        require_plausible(str(path))


def test_a_hub_id_and_a_models_folder_may_be_one(folder: Path) -> None:
    for source in ("gpt2", "Qwen/Qwen3-0.6B", str(folder)):
        require_plausible(source)


def refused(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=401)
    return kind("refused", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(errors.GatedRepoError, "is gated"), (errors.RepositoryNotFoundError, "nor a repository")],
)
def test_what_the_hub_refuses(kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, refused(kind))
    with pytest.raises(UserError, match=words):
        load_model_profile("meta-llama/Llama-2-7b-hf")


def test_the_hubs_cache_serves_while_it_is_out_of_reach(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, ConnectionError("no route to host"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    profile = load_model_profile("someone/small")
    assert profile.revision == folder.name
    assert profile.num_parameters == 106_816
    assert profile.note == "The hub cannot be reached: someone/small from its cache."


def test_the_hub_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        SimpleNamespace(rfilename=name, blob_id=f"blob-{name}", size=1)
        for name in (
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "original/x.pth",
        )
    ]
    answer = SimpleNamespace(
        siblings=files,
        sha="c0ffee",
        config={"tokenizer_config": {"chat_template": "x"}},
        safetensors=SimpleNamespace(parameters={"BF16": 10, "F32": 2}),
    )
    fake_hub(monkeypatch, answer)
    config = llama(architectures=["LlamaForCausalLM"])
    asked: dict[str, Any] = {}

    def from_pretrained(source: str, **given: Any) -> LlamaConfig:
        asked.update(given, source=source)
        return config

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    profile = load_model_profile("someone/small")
    assert (asked["source"], asked["revision"], asked["trust_remote_code"]) == (
        "someone/small",
        "c0ffee",
        False,
    )
    assert profile.revision == "c0ffee"
    assert profile.dtype == "bfloat16"
    assert profile.has_chat_template
    files[1].blob_id = "another"
    assert load_model_profile("someone/small").fingerprint != profile.fingerprint
