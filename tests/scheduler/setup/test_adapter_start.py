"""An adapter's folder as `--model`: gone on with, or merged first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autosft.profiles.errors import UserError
from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import AdapterSettings, Method
from autosft.scheduler.setup.adapter_start import with_adapters_settings, with_merged_adapter
from autosft.studies.request import TuneRequest
from autosft.studies.trial import Measurement
from autosft.workers.load_weights import load_any, load_base
from autosft.workers.training.train import train
from tests.workers.small import job, make_data, make_model, pinned, settings

pytestmark = pytest.mark.slow

ADAPTER = AdapterSettings(rank=4, alpha=10.0, targets=("k_proj", "q_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


def save_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_base(str(base), dtype=torch.float32), LoraConfig(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_its_profile_is_the_bases_with_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    of_base, profile = load_model_profile(str(base)), load_model_profile(str(adapter))
    assert profile.adapter == ADAPTER
    assert profile.source == str(adapter)
    assert profile.config_json == of_base.config_json
    assert profile.note is not None
    assert "goes on from its weights" in profile.note
    other = save_adapter(base, tmp_path / "other", r=2)
    assert len({item.fingerprint for item in (of_base, profile, load_model_profile(str(other)))}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_what_training_does_not_continue_from_is_refused(
    changes: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=words) as error:
        load_model_profile(str(adapter))
    assert "--merge-adapter" in str(error.value)


def test_a_base_or_weights_that_are_gone_are_one_message(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone, which is not there"):
        load_model_profile(str(adapter))
    path.write_text(json.dumps(values))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights of the adapter"):
        load_model_profile(str(adapter))


def test_training_resumes_from_its_weights(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    data = make_data(tmp_path / "data")
    asked = job(
        adapter,
        data,
        tmp_path / "run",
        settings=settings(method=Method.LORA, adapter=ADAPTER, learning_rate=1e-6),
        pinned=pinned(data),
    )
    reports: list[Measurement] = []
    end = train(asked, reports.append, lambda: None)
    assert end.completed, end.message
    last = [report for report in reports if report.checkpoint is not None][-1]
    assert last.checkpoint is not None
    before, after = (
        load_file(Path(item) / "adapter_model.safetensors") for item in (adapter, last.checkpoint)
    )
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-4)
        assert not torch.equal(after[name], weight)
    load_any(last.checkpoint)
    # what is gone on with is the checkpoint, not the start again
    train(replace(asked, attempt=2, resume_from=last.checkpoint), lambda report: None, lambda: None)


@pytest.mark.parametrize(
    ("changes", "adapter"),
    [
        ({}, "lora"),
        ({"use_dora": True}, "dora"),
        ({"use_rslora": True}, "rslora"),
        ({"lora_dropout": 0.1}, "lora,lora_dropout=0.1"),
    ],
)
def test_a_study_has_its_settings(changes: dict[str, Any], adapter: str, base: Path, tmp_path: Path) -> None:
    profile = load_model_profile(str(save_adapter(base, tmp_path / "adapter", **changes)))
    request = with_adapters_settings(TuneRequest(model="x", data="y"), profile)
    assert (request.method, request.adapter) == ("lora", adapter)
    assert request.space == {"lora_rank": 4, "lora_alpha_ratio": 2.5, "lora_targets": "k_proj,q_proj"}
    of_base = load_model_profile(str(base))
    assert with_adapters_settings(TuneRequest(model="x", data="y"), of_base).method == "auto"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "full"}, "--method full"),
        ({"space": {"lora_rank": 8}}, "--lora-rank"),
        ({"method": "lora", "adapter": "ia3"}, "--adapter ia3"),
    ],
)
def test_other_settings_are_refused(given: dict[str, Any], words: str, base: Path, tmp_path: Path) -> None:
    profile = load_model_profile(str(save_adapter(base, tmp_path / "adapter")))
    with pytest.raises(UserError, match=words):
        with_adapters_settings(TuneRequest(model="x", data="y", **given), profile)


def test_it_is_merged_once_where_that_is_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    adapter = save_adapter(base, tmp_path / "adapter")
    request = TuneRequest(model=str(adapter), data="y", merge_adapter=True)
    merged = with_merged_adapter(request, lambda event: None).model
    assert merged is not None
    assert load_model_profile(merged, need_tokenizer=False).adapter is None
    rows = torch.arange(2, 14).view(1, -1)
    with torch.no_grad():
        wanted, found = (
            load_any(str(item), dtype=torch.float32)(input_ids=rows).logits for item in (adapter, merged)
        )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    made_at = (Path(merged) / "config.json").stat().st_mtime_ns
    assert with_merged_adapter(request, lambda event: None).model == merged
    assert (Path(merged) / "config.json").stat().st_mtime_ns == made_at
    with pytest.raises(UserError, match="not the folder of an adapter"):
        with_merged_adapter(request.model_copy(update={"model": str(base)}), lambda event: None)
