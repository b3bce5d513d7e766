"""An adapter's GGUF file is the adapter that was trained, or there is none and the reason is said."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from autosft.cli import main
from autosft.profiles.errors import UserError
from autosft.scheduler.finish.export_served import export_adapter_for_gguf
from autosft.scheduler.finish.weights import weights_in
from autosft.workers.tools import export_gguf_adapter, gguf_converter, gguf_engine
from tests.scheduler.finish.test_export_served import adapter_on, base_model, tiny_llama

needs_llama_cpp = pytest.mark.skipif(
    gguf_converter.home(gguf_converter.ADAPTERS) is None or not gguf_engine.is_here(),
    reason=f"llama.cpp is not here: pip install 'autosft[gguf]', then {gguf_converter.GET_IT}",
)

#: Options of peft, and what is said of an adapter that is refused ("": it is written as it was trained).
ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "rslora": ({"use_rslora": True}, ""),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 32}}, ""),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, ""),
    "all of these": (
        {"use_rslora": True, "alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}},
        "",
    ),
    "a part of the layers": ({"layers_to_transform": [1]}, ""),
    "the head of an untied model": ({"target_modules": ["q_proj", "lm_head"]}, ""),
    "norms": ({"modules_to_save": ["norm", "input_layernorm"]}, "which were trained entirely"),
    "head": ({"modules_to_save": ["lm_head"]}, "which were trained entirely"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "its initialisation changed"),
    "OLoRA": ({"init_lora_weights": "olora"}, "its initialisation changed"),
    "token rows": ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, "token rows"),
    "biases": ({"lora_bias": True}, "biases"),
}


#: Of those that are written, for every run of the tests; `make thorough` has the others.
SAMPLE = ("plain", "all of these")


def trained(folder: Path, options: dict[str, Any], **config: Any) -> Path:
    """Write an adapter on a small Llama; return its folder."""
    base = tiny_llama(folder / "base", **config)
    adapter_on(base, folder / "adapter", **options)
    (folder / "adapter/chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    return folder / "adapter"


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.thorough)
        for name, (_, said) in ADAPTERS.items()
        if not said
    ],
)
def test_an_adapter_file_is_what_was_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = trained(tmp_path, ADAPTERS[name][0])
    written = export_adapter_for_gguf(weights_in(adapter), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter-adapter.gguf"]
    said = "\n".join(written.notes)
    assert "Compared with transformers" in said
    assert "What the adapter changes is the same within" in said
    command = shlex.split(written.command)
    assert command[command.index("--lora") + 1] == str(tmp_path / "out/adapter-adapter.gguf")
    assert f"autosft export {tmp_path / 'base'} --format gguf" in said


@pytest.mark.parametrize("name", [name for name, (_, said) in ADAPTERS.items() if said])
def test_an_adapter_that_llama_cpp_would_apply_otherwise_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autosft.scheduler.finish.export_served.require_converter", lambda script: None)
    options, said = ADAPTERS[name]
    adapter_on(base_model(tmp_path / "base"), tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=said) as raised:
        export_adapter_for_gguf(weights_in(tmp_path / "adapter"), tmp_path / "out")
    assert "--format gguf" in str(raised.value)
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "config", "said"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"tie_word_embeddings": True}, "tied"),
        ({"target_modules": ["q_proj"]}, {"hidden_act": "gelu"}, "probabilities differ"),
    ],
    ids=["on tied embeddings", "a family that differs"],
)
def test_what_only_shows_when_it_is_loaded_is_refused(
    options: dict[str, Any],
    config: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = trained(tmp_path, options, **config)
    with pytest.raises(UserError, match=said):
        export_adapter_for_gguf(weights_in(adapter), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@needs_llama_cpp
@pytest.mark.slow
def test_a_scale_that_is_not_the_trained_one_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effect is compared, too: one that is small beside the logits must not be dropped unseen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = trained(tmp_path, {})
    for path in adapter.glob("*.safetensors"):
        shrink(path, 0.002)
    right = export_gguf_adapter.write_scaled

    def wrong(adapted: Any, folder: Path, checkpoint: str) -> Path:
        place = right(adapted, folder, checkpoint)
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e-6}))
        return place

    monkeypatch.setattr(export_gguf_adapter, "write_scaled", wrong)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"what it changes differs by (0\.9\d?|1) of itself"):
        export_gguf_adapter.export_gguf_adapter(
            str(adapter), tmp_path / "out/a.gguf", dtype="f32", base=str(tmp_path / "base")
        )
    assert not any((tmp_path / "out").iterdir())


def shrink(path: Path, share: float) -> None:
    from safetensors.torch import load_file, save_file

    values = {name: (value * share if "lora_B" in name else value) for name, value in load_file(path).items()}
    save_file(values, path)


@needs_llama_cpp
@pytest.mark.slow
def test_a_chat_template_of_the_adapters_own_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = trained(tmp_path, {})
    (tmp_path / "base/chat_template.jinja").unlink()
    out = tmp_path / "out"
    arguments = ["export", str(adapter), "--format", "gguf-adapter", "--dtype", "f16", "--output", str(out)]
    assert main(arguments) == 0, capsys.readouterr().err
    assert (out / "chat_template.jinja").read_bytes() == (adapter / "chat_template.jinja").read_bytes()
    assert f"--chat-template-file {out / 'chat_template.jinja'}" in capsys.readouterr().out


def test_a_whole_model_is_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosft.scheduler.finish.export_served.require_converter", lambda script: None)
    with pytest.raises(UserError, match="all weights were trained"):
        export_adapter_for_gguf(weights_in(base_model(tmp_path / "base")), tmp_path / "out")


def test_the_alpha_is_the_rank_times_the_scale_that_was_trained(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from autosft.workers.load_weights import load_adapter, load_base

    base = base_model(tmp_path / "base")
    options = {"use_rslora": True, "alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}}
    adapter_on(base, tmp_path / "adapter", **options)
    adapted = load_adapter(load_base(str(base), dtype=torch.float32), tmp_path / "adapter")
    place = export_gguf_adapter.write_scaled(adapted, tmp_path / "scaled", "it")
    alpha = json.loads((place / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(place / "adapter_model.safetensors")
    for name, module in adapted.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            torch.testing.assert_close(b @ a * alpha / len(a), module.get_delta_weight("default"))
