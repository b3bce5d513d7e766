"""What is exported to be served is the model that was trained, and the command beside it starts it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from autosft.cli import main
from autosft.profiles.errors import UserError
from autosft.profiles.model.files import stored_dtype
from autosft.scheduler.finish import export_served
from autosft.scheduler.finish.export_served import export_for_gguf, export_for_vllm
from autosft.scheduler.finish.weights import Weights, weights_in, write_weights
from autosft.workers.load_weights import load_any, load_base
from autosft.workers.tools.merge_adapter import merge
from autosft.workers.tools.shared_files import find_tokenizer_model
from tests.workers.small import make_model
from tests.workers.tools.test_gguf_files import Case, folder_of, needs_llama_cpp


def base_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    make_model(folder)
    load_base(str(folder), dtype=dtype).save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Save an adapter that changes what the base says; return its logits after some tokens, in memory."""
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8, **options}
    model = get_peft_model(load_base(str(base), dtype=torch.float32), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model.eval()(input_ids=ROWS).logits
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return logits


ROWS = torch.arange(2, 14).view(1, -1)
#: Adapters that llama.cpp's converter and vLLM apply otherwise than peft, and what vLLM's refusal says.
ADAPTERS = {
    "plain": ({}, ""),
    "rslora": ({"use_rslora": True}, ""),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 32}}, "alpha_pattern"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "norms": ({"modules_to_save": ["norm", "input_layernorm"]}, "which were trained entirely"),
    "head": ({"modules_to_save": ["lm_head"]}, "which were trained entirely"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "its initialisation changed"),
    "OLoRA": ({"init_lora_weights": "olora"}, "its initialisation changed"),
    "token rows": ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, "token rows"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_adapter_is_what_was_trained_or_it_is_refused(name: str, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    trained = adapter_on(base, tmp_path / "adapter", **ADAPTERS[name][0])
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), str(base))
    with torch.no_grad():
        found = load_base(str(tmp_path / "merged"), dtype=torch.float32)(input_ids=ROWS).logits
    torch.testing.assert_close(found, trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_vllm_gets_adapters_that_it_applies_as_they_were_trained(name: str, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    options, refusal = ADAPTERS[name]
    trained = adapter_on(base, tmp_path / "adapter", **options)
    weights = weights_in(tmp_path / "adapter")
    if refusal:
        with pytest.raises(UserError, match=refusal) as raised:
            export_for_vllm(weights, tmp_path / "out", merge=False)
        assert "--merge" in str(raised.value)
        assert not (tmp_path / "out").exists()
        return
    written = export_for_vllm(weights, tmp_path / "out", merge=False)
    with torch.no_grad():
        torch.testing.assert_close(load_any(str(tmp_path / "out"))(input_ids=ROWS).logits, trained)
    said = shlex.split(written.command)
    assert said[:3] == ["vllm", "serve", str(base)]
    assert said[said.index("--max-lora-rank") + 1] == "8", "the smallest that vLLM takes for rank 4"
    assert said[said.index("--lora-modules") + 1] == f"adapter={tmp_path / 'out'}"
    assert (tmp_path / "out/serve.sh").read_text().endswith(f"exec {written.command}\n")


@pytest.mark.slow
def test_vllm_gets_a_merged_model_with_the_command_that_serves_it(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", dtype=torch.bfloat16)
    trained = adapter_on(base, tmp_path / "adapter")
    written = export_for_vllm(weights_in(tmp_path / "adapter"), tmp_path / "out", merge=True, dtype="f32")
    assert stored_dtype(str(tmp_path / "out")) == "float32"
    with torch.no_grad():
        found = load_base(str(tmp_path / "out"), dtype="auto")(input_ids=ROWS).logits
    torch.testing.assert_close(found, trained, rtol=1e-3, atol=1e-4)
    assert shlex.split(written.command) == [
        *("vllm", "serve", str(tmp_path / "out"), "--served-model-name", "adapter"),
    ]


@pytest.mark.slow
def test_a_whole_model_has_its_bases_dtype_and_its_folders_rights(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", dtype=torch.bfloat16)
    checkpoint = tmp_path / "checkpoint"
    base_model(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    weights = Weights(name="tuned", checkpoint=checkpoint, base=str(base), is_adapter=False)
    output = tmp_path / "out"
    output.mkdir(mode=0o750)
    [note] = write_weights(weights, output, merge=False, dtype=None)
    assert "bfloat16" in note
    assert stored_dtype(str(output)) == "bfloat16"
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o640}
    assert not (output / "optimizer.pt").exists()
    again = tmp_path / "again"
    again.mkdir()
    assert write_weights(weights, again, merge=False, dtype="f32") == ()
    assert stored_dtype(str(again)) == "float32"


def test_tokenizer_model_comes_along_from_the_base(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    adapter_on(base, tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), str(base))
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("source", ["/gone/model", "nobody/never", "~/gone", ""])
def test_of_a_base_that_is_not_here_nothing_is_known(source: str, tmp_path: Path) -> None:
    assert stored_dtype(source) is None
    assert find_tokenizer_model(source) is None
    checkpoint = base_model(tmp_path / "checkpoint")
    assert Weights(name="a", checkpoint=checkpoint, base=source, is_adapter=False).dtype == "float32"


def test_what_lies_below_a_model_is_not_copied(tmp_path: Path) -> None:
    folder = base_model(tmp_path / "run")
    base_model(folder / "checkpoints/step-000008")
    (folder / "training_args.bin").write_bytes(b"of training")
    export_for_vllm(weights_in(folder), tmp_path / "out", merge=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "serve.sh"} <= names
    assert not names & {"checkpoints", "training_args.bin"}


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        weights_in(tmp_path)


REFUSALS = {
    "a folder has no configuration": (["--format", "trl"], "only a study has a configuration"),
    "a dtype of another format": (["--format", "vllm", "--dtype", "q8_0"], "It applies to --format gguf"),
    "a dtype of no weights": (["--format", "trl", "--dtype", "f32"], "It applies to --format hub"),
    "an adapter's dtype": (["--format", "vllm", "--dtype", "f32"], "exported as it was trained"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_flags_that_do_not_go_together_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_on(base_model(tmp_path / "base"), tmp_path / "adapter")
    flags, said = REFUSALS[name]
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err


@needs_llama_cpp
@pytest.mark.slow
def test_an_adapter_becomes_a_gguf_file_with_a_modelfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny_llama(tmp_path / "base")
    adapter_on(
        base, tmp_path / "adapter", use_rslora=True, modules_to_save=["norm"], alpha_pattern={"q_proj": 32}
    )
    (tmp_path / "adapter/chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    output = tmp_path / "out"
    assert main(["export", str(tmp_path / "adapter"), "--format", "gguf", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "Compared with transformers" in said
    assert f"ollama create adapter -f {output}/Modelfile" in said
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "adapter.gguf"]
    text = (output / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text


@needs_llama_cpp
@pytest.mark.slow
def test_a_gguf_file_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny_llama(tmp_path / "base", hidden_act="gelu")
    with pytest.raises(UserError, match="probabilities differ"):
        export_for_gguf(weights_in(base), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """Write a small Llama with random weights, a byte-level tokenizer and ChatML."""
    from autosft.workers.tools.tiny_twin import tiny_twin

    folder_of(Case(name="Llama", config=changes), folder)
    tiny_twin((folder / "config.json").read_text()).save_pretrained(folder)
    return folder


def test_without_the_converter_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("--format gguf needs llama.cpp's converter")

    monkeypatch.setattr(export_served, "require_converter", missing)
    with pytest.raises(UserError, match=r"needs llama\.cpp's converter"):
        export_for_gguf(weights_in(base_model(tmp_path / "model")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "llama"
