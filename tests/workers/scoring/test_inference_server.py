"""Models answer in the order they are asked, whatever shares a batch, and their mistakes are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch
from datasets import Dataset

from autosft.workers.scoring.inference_server import Answerer, generate, load, samples_of
from autosft.workers.scoring.precision import stored_dtype
from tests.workers.small import make_data, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_do_not_depend_on_who_shares_the_batch(model: str) -> None:
    loaded = load(model)
    prompts = [[2, 3, 4, 5, 6, 7], [9], [4, 5], [11, 12, 13]]
    together = generate(loaded, prompts, max_new_tokens=6, batch_size=4)
    alone = [generate(loaded, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1, "the example has lost its point"


def test_a_chat_template_makes_a_turn_of_a_prompt(model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    templated = str(make_model(tmp_path / "templated"))
    tokenizer = AutoTokenizer.from_pretrained(templated)
    tokenizer.chat_template = "w30 {{ messages[-1].content }} w31"
    tokenizer.save_pretrained(templated)
    plain, turn = (generate(load(model), [item], max_new_tokens=4)[0] for item in ([5, 6], [30, 5, 6, 31]))
    assert plain != turn, "the example has lost its point"

    def answers(*models: str) -> list[str]:
        request = {"models": models, "conversations": ask("w5 w6"), "max_new_tokens": 4}
        return [texts[0] for texts in Answerer().serve(request)["answers"]]

    assert answers(model) == [plain]
    assert answers(model, templated) == [turn, turn]  # the same weights, asked by the same template


def test_samples_show_the_prompt_and_the_first_scored_span(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [2, 3, 4, 5, 6, 7], "labels": [-100, -100, 4, 5, -100, 7], "first_label": 2},
        {"input_ids": [8, 9, 10, 11], "labels": [8, 9, 10, 11], "first_label": 0},  # plain text
        {"input_ids": [2] * 2000, "labels": [-100] * 1999 + [2], "first_label": 1999},  # too long to show
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "eval"))
    prompts, expected = samples_of(str(tmp_path), 5)
    assert (prompts, expected) == ([[2, 3], [8, 9]], [[4, 5], [10, 11]])


def test_an_answer_streams_to_what_it_is_in_one_piece(model: str) -> None:
    said: list[dict[str, str]] = []
    request = {"models": [model], "conversations": ask("w2 w3"), "max_new_tokens": 8}
    whole = Answerer().serve(request)["answers"]
    streamed = Answerer(say=said.append).serve({**request, "streams": True})["answers"]
    assert streamed == whole
    assert "".join(piece["text"] for piece in said) == whole[0][0]
    assert len([piece for piece in said if piece["text"]]) > 2, "as it grows"


def test_an_answer_can_be_stopped(model: str) -> None:
    is_stopped, said = Event(), []

    def stop_at_the_third(piece: dict[str, str]) -> None:
        said.append(piece["text"])
        if len(said) == 3:
            is_stopped.set()

    answerer = Answerer(say=stop_at_the_third, is_stopped=is_stopped)
    request = {"models": [model], "conversations": ask("w2 w3"), "max_new_tokens": 50, "streams": True}
    [[answer]] = answerer.serve(request)["answers"]
    assert answer == "".join(said)
    assert len(answer.split()) <= 4
    again = answerer.serve({**request, "max_new_tokens": 8})["answers"][0][0]
    assert len(again.split()) > 4, "the next answer is whole"


def test_compared_models_answer_in_one_precision(model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "half")
    assert stored_dtype(str(tmp_path / "half")) == "bfloat16"
    answerer = Answerer()
    names = [model, str(tmp_path / "half")]
    answerer.serve({"models": names, "conversations": ask("w2"), "max_new_tokens": 1})
    assert {loaded.network.dtype for loaded in answerer._loaded.values()} == {torch.float32}


@pytest.mark.slow
def test_a_process_serves_requests_line_by_line(model: str, tmp_path: Path) -> None:
    data = make_data(tmp_path)
    requests = [
        {"models": [model], "conversations": ask("w2 w3"), "max_new_tokens": 3},
        {"models": [str(tmp_path / "nowhere")], "conversations": ask("w2"), "max_new_tokens": 3},
        {"models": [model, model], "data_dir": str(data), "num_samples": 2, "max_new_tokens": 3},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "autosft.workers.scoring.inference_server"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    shares = [each["share"] for each in said if "share" in each]
    assert shares == sorted(shares)
    assert 0.0 < shares[0] < 0.5 < shares[-1] <= 1.0
    first, second, third = (each for each in said if "share" not in each)
    assert [len(texts) for texts in first["answers"]] == [1]
    assert "nowhere" in second["error"]
    assert [len(texts) for texts in third["answers"]] == [2, 2]
    assert len(third["samples"]) == 2
