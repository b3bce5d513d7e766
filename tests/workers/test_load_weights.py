"""What is loaded is what the checkpoint holds: every name, every number, in every place that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapted_layers import share_weights
from autosft.profiles.model.adapters import KINDS, chosen, peft_config
from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import AdapterSettings, Method, Precision
from autosft.studies.trial import Measurement
from autosft.workers.load_weights import load_adapter, load_any, load_base
from autosft.workers.scoring import inference_server, saved_models
from autosft.workers.tools.merge_adapter import merge, require_weights_of_their_own
from autosft.workers.training import score_checkpoint
from autosft.workers.training.load import load_model
from autosft.workers.training.train import train
from tests.workers import checkpoints
from tests.workers.small import job, lora, make_data, make_model, pinned, plan, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


# Names and shapes


@pytest.mark.parametrize("name", checkpoints.WRONG)
def test_weights_that_are_not_the_models_are_refused_before_and_at_every_load(
    name: str, data: Path, tmp_path: Path
) -> None:
    change, words = checkpoints.WRONG[name]
    folder = make_model(tmp_path / "model")
    checkpoints.store(folder, change(checkpoints.weights_of(folder)))
    loads = {
        "plan": lambda: load_model_profile(str(folder)),
        "tune, train": lambda: load_model(job(folder, data, tmp_path)),
        "evaluate": lambda: saved_models.load(str(folder), trust_remote_code=False),
        "chat": lambda: inference_server.load(str(folder)),
        "export": lambda: merge(str(folder), str(tmp_path / "merged"), str(folder)),
    }
    for load in loads.values():
        with pytest.raises(UserError) as error:
            load()
        assert words in str(error.value)


@pytest.mark.parametrize("name", checkpoints.BROKEN)
def test_weights_that_are_no_numbers_are_refused_at_every_load(name: str, data: Path, tmp_path: Path) -> None:
    change, words = checkpoints.BROKEN[name]
    folder = make_model(tmp_path / "model")
    checkpoints.store(folder, change(checkpoints.weights_of(folder)))
    for load in (
        lambda: load_model(job(folder, data, tmp_path)),
        lambda: saved_models.load(str(folder), trust_remote_code=False),
        lambda: inference_server.load(str(folder)),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert words in str(error.value)


def test_added_and_silenced_layers_may_be_zeros(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    weights = checkpoints.weights_of(folder)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight", "gate_proj.weight")):
            weights[name].zero_()  # 6 of 16 matrices
    checkpoints.store(folder, weights)

    load_base(str(folder), dtype=torch.float32)


def test_weights_as_torch_saved_them_before_1_6_are_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    weights = checkpoints.weights_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    load_model_profile(str(folder))
    loaded = load_base(str(folder), dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in weights.items())


def test_an_empty_quantization_is_none(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    weights = checkpoints.weights_of(folder)
    checkpoints.change_config(folder, quantization_config={})

    assert load_model_profile(str(folder)).quantization is None
    loaded = load_base(str(folder), dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in weights.items())


@pytest.mark.parametrize("name", checkpoints.RIGHT)
@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_that_are_all_there_are_loaded(name: str, is_tied: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", is_tied=is_tied)
    plain = checkpoints.weights_of(folder)
    checkpoints.store(folder, checkpoints.RIGHT[name](plain))
    load_model_profile(str(folder))
    loaded = load_base(str(folder), dtype=torch.float32).state_dict()
    for key, weight in plain.items():
        assert torch.equal(loaded[key], weight)


def test_pickled_weights_are_checked_as_well(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    plain = checkpoints.weights_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save(plain, folder / "pytorch_model.bin")
    load_model_profile(str(folder))
    torch.save({f"module.{name}": one for name, one in plain.items()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="DistributedDataParallel"):
        load_model_profile(str(folder))


def test_a_head_of_its_own_is_trained_and_counted_although_the_configuration_ties_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", is_tied=True)
    tied = load_model_profile(str(folder))
    weights = checkpoints.weights_of(folder)
    checkpoints.store(folder, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert load_model_profile(str(folder)).has_tied_embeddings
    head = weights["model.embed_tokens.weight"] + 1
    checkpoints.store(folder, {**weights, "lm_head.weight": head})

    profile, model = load_model_profile(str(folder)), load_base(str(folder), dtype=torch.float32)
    assert not profile.has_tied_embeddings
    assert profile.num_parameters == tied.num_parameters + head.numel()
    assert profile.note is not None
    assert "Its output head is not its embeddings" in profile.note
    assert torch.equal(model.get_output_embeddings().weight, head)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False


def test_a_file_that_is_cut_off_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        load_model_profile(str(folder))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_model_profile(str(folder))


# Quantized checkpoints


@pytest.mark.parametrize("kind", checkpoints.DEQUANTIZED)
def test_quantized_weights_are_trained_dequantized_and_saved_plain(
    kind: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    plain = checkpoints.DEQUANTIZED[kind](folder)
    profile = load_model_profile(str(folder))
    assert profile.quantization == kind.partition(",")[0]
    assert profile.num_parameters == sum(item.numel() for item in plain.values())
    assert profile.note is not None
    assert "dequantized" in profile.note
    model = load_model(job(folder, data, tmp_path, pinned=pinned(data, attention=profile.attention)))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path / "again")
    saved = load_base(str(tmp_path / "again"), dtype="auto")
    assert not hasattr(saved.config, "quantization_config")
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_a_quantized_base_is_fine_tuned_whole_and_its_checkpoints_are_plain(
    data: Path, tmp_path: Path
) -> None:
    checkpoints.fp8(tmp_path / "model")
    reports: list[Measurement] = []
    end = train(job(tmp_path / "model", data, tmp_path / "run"), reports.append, lambda: None)
    assert end.completed, end.message
    [*_, last] = [report.checkpoint for report in reports if report.checkpoint is not None]
    stored = load_file(Path(last) / "model.safetensors")
    assert {item.dtype for item in stored.values()} == {torch.float32}


@pytest.mark.parametrize("kind", checkpoints.REFUSED)
def test_what_cannot_be_dequantized_is_refused_by_name(kind: str, data: Path, tmp_path: Path) -> None:
    quantized, words = checkpoints.REFUSED[kind]
    folder = make_model(tmp_path / "model")
    checkpoints.change_config(folder, quantization_config=quantized)
    for load in (
        lambda: load_model_profile(str(folder), need_tokenizer=False),
        lambda: load_model(job(folder, data, tmp_path)),
        lambda: saved_models.load(str(folder), trust_remote_code=False),
    ):
        with pytest.raises(UserError, match="cannot dequantize") as error:
            load()
        assert words in str(error.value)


@pytest.mark.parametrize("kind", checkpoints.NEEDS_PACKAGE)
def test_a_package_that_dequantizing_takes_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, package = checkpoints.NEEDS_PACKAGE[kind]
    folder = make_model(tmp_path / "model")
    checkpoints.change_config(folder, quantization_config=quantized)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_model_profile(str(folder), need_tokenizer=False)  # a plan for another machine takes none
    with pytest.raises(UserError, match=f"pip install {package}"):
        load_model_profile(str(folder))


def test_qlora_over_other_quantized_weights_is_refused(data: Path, tmp_path: Path) -> None:
    checkpoints.fp8(tmp_path / "model")
    asked = replace(lora(), method=Method.QLORA)
    with pytest.raises(UserError, match="--method lora"):
        load_model(job(tmp_path / "model", data, tmp_path, settings=asked))


# Adapters


def adapter_of(text: str, *, rank: int = 4, targets: Any = "all-linear") -> AdapterSettings:
    return AdapterSettings(rank=rank, alpha=8, targets=targets, **chosen(text))


def save_adapter(base: Path, output: Path, adapter: AdapterSettings) -> Path:
    """Save an adapter that changes what the model says, whatever its kind starts from."""
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(load_base(str(base), dtype=torch.float32), peft_config(adapter))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(output)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(output)
    return output


OPTIONS = {
    "road": ",group_size=8",
    "vblora": ",vector_length=8",
    "oft": ",oft_block_size=4",
    "boft": ",boft_block_size=4",
    "waveft": ",n_frequency=64",
    "fourierft": ",n_frequency=64",
    "c3a": ",block_size=8",
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cartridge"])
def test_an_adapter_of_any_kind_loads_and_merges_to_what_it_was(kind: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = adapter_of(kind + OPTIONS.get(kind, ""))
    saved = save_adapter(base, tmp_path / "adapter", adapter)
    loaded = load_any(str(saved), dtype=torch.float32)
    rows = torch.arange(2, 14).view(1, -1)
    with torch.no_grad():
        adapted = loaded(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
        plain = load_base(str(base), dtype=torch.float32)(input_ids=rows).logits
    assert not torch.allclose(adapted[:, -12:], plain, atol=1e-4), "the adapter does nothing"
    if not KINDS[kind].can_merge:
        return
    merge(str(saved), str(tmp_path / "merged"), str(base))
    with torch.no_grad():
        merged = load_base(str(tmp_path / "merged"), dtype=torch.float32)(input_ids=rows).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-4)


def test_an_adapter_whose_file_lacks_weights_or_has_others_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    saved = save_adapter(base, tmp_path / "adapter", adapter_of("lora"))
    path = saved / "adapter_model.safetensors"
    whole = load_file(path)
    first = sorted(whole)[0]
    save_file({name: one for name, one in whole.items() if name != first}, path)
    with pytest.raises(UserError, match="1 weights of the adapter are missing"):
        load_any(str(saved))
    save_file({**whole, first.replace("layers.0", "layers.7"): whole[first].clone()}, path)
    with pytest.raises(UserError, match=r"layers\.7"):
        load_any(str(saved))


def test_the_base_of_an_adapter_is_found_beside_it_or_named(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    saved = save_adapter(base, tmp_path / "adapter", adapter_of("lora"))
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_model_name_or_path": "../base"}))
    load_any(str(saved))
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone, which is not there"):
        load_any(str(saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_tied_embeddings_is_merged_into_an_untied_model(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", is_tied=True)
    load_base(str(base), dtype=dtype).save_pretrained(base)
    saved = save_adapter(base, tmp_path / "adapter", adapter_of("lora", targets=("q_proj", "embed_tokens")))
    [note] = merge(str(saved), str(tmp_path / "merged"), str(base))
    assert "tie_word_embeddings is false" in note
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    rows = torch.arange(2, 14).view(1, -1)
    with torch.no_grad():
        adapted = load_any(str(saved), dtype=torch.float32)(input_ids=rows).logits
        merged = load_base(str(tmp_path / "merged"), dtype=torch.float32)(input_ids=rows).logits
    torch.testing.assert_close(merged, adapted, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-4)


def test_a_merged_model_that_is_another_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", is_tied=True)
    saved = save_adapter(base, tmp_path / "adapter", adapter_of("lora", targets=("embed_tokens",)))
    monkeypatch.setattr("autosft.workers.tools.merge_adapter.untie", lambda model: None)
    with pytest.raises(UserError, match="is not the adapter of"):
        merge(str(saved), str(tmp_path / "merged"), str(base))
    assert not any((tmp_path / "merged").glob("*"))


# What is trained


@pytest.mark.parametrize("kind", ["ln_tuning", "lora", "ia3", "prompt_tuning,num_virtual_tokens=4"])
def test_what_is_trained_over_bf16_weights_is_fp32_and_changes(kind: str, data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    asked = job(
        model,
        data,
        tmp_path / "run",
        settings=settings(method=Method.LORA, adapter=adapter_of(kind), learning_rate=1e-4),
        pinned=pinned(data, precision=Precision.BF16),
        plan=plan(micro_batch=4, effective_batch_size=8),
    )
    reports: list[Measurement] = []
    end = train(asked, reports.append, lambda: None)
    assert end.completed, end.message
    last = [report for report in reports if report.checkpoint is not None][-1]
    assert last.checkpoint is not None
    stored = load_file(Path(last.checkpoint) / "adapter_model.safetensors")
    if kind == "ln_tuning":
        assert {item.dtype for item in stored.values()} == {torch.float32}
        assert any((item != 1).any() for item in stored.values())
    # and it is scored again as it was trained
    loaded = score_checkpoint.load(replace(asked, resume_from=last.checkpoint)).model
    own = [one for name, one in loaded.named_parameters() if "default" in name]
    assert all(checkpoint.dtype is torch.float32 for checkpoint in own)


@pytest.mark.parametrize(
    ("precision", "rate"), [(Precision.FP32, 0.0), (Precision.BF16, 1e-9)], ids=["no rate", "lost in bf16"]
)
def test_a_run_in_which_nothing_changes_is_an_error(
    precision: Precision, rate: float, data: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    asked = job(
        model,
        data,
        tmp_path / "run",
        settings=settings(learning_rate=rate, weight_decay=0.0),
        pinned=pinned(data, precision=precision),
    )
    with pytest.raises(UserError, match="no trained weight has changed"):
        train(asked, lambda report: None, lambda: None)


def test_the_adapter_of_a_loaded_base_keeps_its_own_precision(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    saved = save_adapter(base, tmp_path / "adapter", adapter_of("ln_tuning"))
    stored = load_file(saved / "adapter_model.safetensors")
    loaded = load_adapter(load_base(str(base), dtype=torch.bfloat16), saved)
    found = {name: one for name, one in loaded.named_parameters() if "ln_tuning_layers.default" in name}
    assert len(found) == len(stored)
    for name, one in found.items():
        assert torch.equal(one, stored[name.replace(".default", "")])


@pytest.mark.parametrize("is_shared", [True, False])
def test_an_adapter_on_layers_that_share_a_weight_is_not_merged(is_shared: bool, tmp_path: Path) -> None:
    """As Zamba 2's blocks: each use has its own change, and the one weight would get all of them."""
    from peft import LoraConfig, get_peft_model

    model = load_base(str(make_model(tmp_path / "model")), dtype=torch.float32)
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    if is_shared:
        second.weight = first.weight
    assert share_weights(model) is is_shared
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    if is_shared:
        with pytest.raises(UserError, match="share one weight") as error:
            require_weights_of_their_own(adapted, "c")
        assert "without --merge" in (error.value.remedy or "")
    else:
        require_weights_of_their_own(adapted, "c")


BROKEN_ADAPTERS = {
    "NaN": (
        lambda path: save_file({k: v * float("nan") for k, v in load_file(path).items()}, path),
        "no numbers",
    ),
    "git lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "not a safetensors",
    ),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_adapters_that_are_no_numbers_are_refused(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    change, words = BROKEN_ADAPTERS[name]
    base = str(make_model(tmp_path / "model"))
    get_peft_model(
        load_base(base, dtype=torch.float32), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match=words):
        load_adapter(load_base(base, dtype=torch.float32), tmp_path / "adapter")
