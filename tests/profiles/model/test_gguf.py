"""A GGUF file as a model: nothing of it is lost on the way to a plain folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.errors import UserError
from autosft.profiles.model import gguf
from autosft.profiles.model.gguf import SAMPLES, description, is_gguf, plain_folder
from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import AdapterSettings, Method
from autosft.studies.trial import Measurement
from autosft.workers.load_weights import load_any, load_base
from autosft.workers.scoring import inference_server, saved_models
from autosft.workers.tools.merge_adapter import merge
from autosft.workers.training.train import train
from tests.profiles.model.gguf_files import TEMPLATE, make_gguf
from tests.workers.small import job, make_data, pinned, settings

pytestmark = pytest.mark.slow


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(plain_folder(str(path)))


@pytest.fixture
def apart() -> None:
    """Convert in a process of its own, as it is done."""


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the other process, whose imports take long."""
    if "apart" in request.fixturenames:
        return

    def convert(path: Path, folder: Path, *, need_weights: bool) -> None:
        try:
            gguf.convert(path, folder, need_weights=need_weights)
        except UserError as error:
            raise gguf.unreadable(path, error.message) from error

    monkeypatch.setattr(gguf, "convert_apart", convert)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "autosft" / "gguf"


@pytest.mark.parametrize(
    ("is_tied", "quantization"),
    [(True, "Q8_0"), (False, "Q4_1"), (True, "Q5_0"), (True, "F16"), (False, "F32")],
)
def test_weights_and_tokens_are_the_files_own(is_tied: bool, quantization: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    plain, tokenizer = make_gguf(path, is_tied=is_tied, quantization=quantization)
    profile = load_model_profile(str(path))
    assert profile.source == str(path)
    assert profile.has_tied_embeddings == is_tied
    assert profile.dtype == "float32"
    assert profile.has_chat_template
    assert profile.note is not None
    assert "dequantized" in profile.note
    model = load_base(str(path), dtype="auto")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-6, atol=0)
    loaded = tokenizer_of(path)
    for text in SAMPLES:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.chat_template == TEMPLATE
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<pad>")
    assert model.generation_config.eos_token_id == 1


def test_a_plan_needs_no_weights_and_the_same_file_is_converted_once(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    planned = load_model_profile(str(path), need_weights=False)
    assert not list(cache.glob("*/*.safetensors"))
    trained = load_model_profile(str(path))
    assert trained.fingerprint == planned.fingerprint
    [weights] = cache.glob("*/*.safetensors")
    made_at = weights.stat().st_mtime_ns
    moved = path.rename(tmp_path / "elsewhere")
    assert load_model_profile(str(moved)).num_parameters == trained.num_parameters
    assert weights.stat().st_mtime_ns == made_at
    make_gguf(path, quantization="Q4_1")
    assert load_model_profile(str(path)).fingerprint != trained.fingerprint


def test_digits_are_separate_tokens_if_the_file_requires_it(tmp_path: Path) -> None:
    make_gguf(tmp_path / "tiny.gguf", pre="smollm")
    ids = tokenizer_of(tmp_path / "tiny.gguf")("and  12")["input_ids"]
    make_gguf(tmp_path / "other.gguf", pre="gpt-2")
    tokenizer = tokenizer_of(tmp_path / "other.gguf")
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["1", "2"]
    assert tokenizer("and  12")["input_ids"] != ids


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"extra": {"blk.0.attn_q.bias": (32,)}}, "no place|holds"),
        ({"extra": {"rope_freqs.weight": (4,)}}, "rotary positions"),
        ({"scaling": "yarn"}, "rotary positions (yarn)"),
        ({"pre": "somebodys-own"}, "'somebodys-own'"),
    ],
)
def test_what_would_be_lost_is_refused(
    given: dict[str, object], words: str, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        load_model_profile(str(path))
    assert any(part in str(error.value) for part in words.split("|"))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_tokens_that_came_out_different_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    metadata, _ = gguf.read_metadata(path)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[7], tokens[8] = tokens[8], tokens[7]
    with pytest.raises(UserError, match="the first is 7"):
        gguf.load_tokenizer(path, {**metadata, "tokenizer.ggml.tokens": tokens})


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not at all")
    assert not is_gguf(str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="not a GGUF file"):
        load_model_profile(str(tmp_path / "model.gguf"))
    assert plain_folder("a/b") == "a/b"


def test_the_note_names_the_file(tmp_path: Path) -> None:
    make_gguf(tmp_path / "tiny.gguf", quantization="Q4_1")
    assert description(str(tmp_path / "tiny.gguf")) == "GGUF, Q4_1"


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
def test_a_gguf_file_is_trained_evaluated_chatted_with_and_exported(
    method: Method, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    data = make_data(tmp_path / "data")
    lora = AdapterSettings(rank=4, alpha=8, targets="all-linear") if method is Method.LORA else None
    asked = job(
        path,
        data,
        tmp_path / "run",
        settings=settings(method=method, adapter=lora, learning_rate=1e-3),
        pinned=pinned(data),
    )
    reports: list[Measurement] = []
    end = train(asked, reports.append, lambda: None)
    assert end.completed, end.message
    [*_, last] = [report.checkpoint for report in reports if report.checkpoint is not None]
    if method is Method.LORA:
        stated = json.loads((Path(last) / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert stated == str(path)
        merge(last, str(tmp_path / "merged"), str(path))
        load_base(str(tmp_path / "merged"), dtype="auto")
    load_any(last)
    for model in (last, str(path)):
        saved_models.load(model, trust_remote_code=False)
        inference_server.generate(inference_server.load(model), [[5, 6, 7]], max_new_tokens=2)


def test_data_is_prepared_with_the_files_tokenizer(apart: None, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    lines = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(40)
    ]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepared = prepare(str(source), model=str(path), cache_dir=tmp_path / "prepared")
    assert prepared.train.num_examples > 0
    assert not list(cache.glob("*/*.safetensors"))
