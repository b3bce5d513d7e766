"""Whoever generates stops where a turn ends, and what is trained says where that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from autosft.profiles.dataset.turn_end import set_turn_end
from autosft.workers.scoring.generation import generate, prompt_tokens
from autosft.workers.scoring.inference_server import Answerer
from autosft.workers.scoring.saved_models import ask_prompts, load
from tests.profiles.dataset.small_tokenizer import make_tokenizer

ASK = [[{"role": "user", "content": "hi"}]]


def template(after: str) -> str:
    return (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}"
        f"{{{{ {after!r} if m.role == 'assistant' else '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )


def make_model(folder: Path, *, after: str, listed: list[str] | None = None) -> Path:
    """Write a model that says "a", what its template writes after an answer, and then "a" again, for ever."""
    tokenizer = make_tokenizer(chat_template=template(after), special=("<|im_end|>", "<|endoftext|>"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    [newline] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    said = [newline, *tokenizer(f"a{after.rstrip()}", add_special_tokens=False)["input_ids"]]
    assert len(set(said)) == len(said), "each token tells which one comes next"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        torch.nn.init.orthogonal_(model.model.embed_tokens.weight)
        model.lm_head.weight.zero_()
        shown = model.model.norm(model.model.embed_tokens.weight)
        for now, following in zip(said, [*said[1:], said[1]], strict=True):
            model.lm_head.weight[following] += shown[now]
    if listed is not None:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(listed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CASES = [
    pytest.param("<|im_end|>", None, id="the template's end is not the tokenizer's"),
    pytest.param("</s>", None, id="it is the tokenizer's"),
    pytest.param("<|im_end|>\n", ["<|endoftext|>"], id="and another one is listed"),
    pytest.param("#!E", None, id="text"),
]


@pytest.mark.parametrize(("after", "listed"), CASES)
def test_every_way_of_answering_stops_at_the_end_of_the_turn(
    after: str, listed: list[str] | None, tmp_path: Path
) -> None:
    folder = str(make_model(tmp_path / "model", after=after, listed=listed))
    request = {"models": [folder], "conversations": ASK, "max_new_tokens": 12}
    assert Answerer().serve(request)["answers"] == [["a"]]  # chat, report, the demo
    loaded = load(folder, trust_remote_code=False)
    assert generate(loaded.model, loaded.tokenizer, ASK, max_new_tokens=12, batch_size=1) == ["a"]
    ids = torch.tensor([prompt_tokens(ASK[0], loaded.tokenizer)])
    if "E" not in after:  # lm-eval and functions of the user's let the model generate by itself
        output = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)
        assert len(output[0]) == ids.shape[1] + 2


def test_ifeval_asks_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosft.profiles.dataset.ifeval_prompts import Prompt

    answers: list[str] = []

    def check(prompt: Any, answer: str) -> Any:
        answers.append(answer)
        return (True,), (True,)

    monkeypatch.setattr("autosft.workers.scoring.saved_models.check_here", check)
    loaded = load(str(make_model(tmp_path / "model", after="<|im_end|>")), trust_remote_code=False)
    ask_prompts(loaded, [Prompt(key=1, prompt="hi", instructions=("x",), arguments=({},))], max_new_tokens=12)
    assert answers == ["a"]


def test_a_saved_model_contains_its_end_of_turn(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", after="<|im_end|>")
    tokenizer = make_tokenizer(chat_template=template("<|im_end|>"), special=("<|im_end|>", "<|endoftext|>"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_turn_end(model, tokenizer)
    model.save_pretrained(tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
    assert set(told) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_model_is_asked_with_the_date_that_it_was_trained_with(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{{ strftime_now('%Y-%m-%d') }}")
    tokenizer.init_kwargs["template_date"] = "2020-02-02"

    def asked(**options: Any) -> str:
        return str(tokenizer.decode(prompt_tokens(ASK[0], tokenizer, **options)))

    assert asked() == "2020-02-02"
    assert asked(date="2021-03-03") == "2021-03-03"
    del tokenizer.init_kwargs["template_date"]
    assert asked() not in ("2020-02-02", "2021-03-03")
