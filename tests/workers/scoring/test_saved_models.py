"""Scores of saved models: against sums made by hand, with intervals; bad requests."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from autosft.cli import main
from autosft.profiles.dataset import Split, prepare
from autosft.profiles.errors import UserError
from autosft.workers.scoring.generation import batch_that_fits, bytes_per_sequence
from autosft.workers.scoring.lm_eval_tasks import task_scores
from autosft.workers.scoring.saved_models import LoadedModel, function_scores, load, loss_scores
from tests.cli.chat_model import make_chat_model, write_chats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("scoring") / "model")


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load(str(model), trust_remote_code=False)


def test_a_loss_is_that_of_a_plain_forward_pass(model: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    data = prepare(str(write_chats(tmp_path / "chats.jsonl")), model=str(model), cache_dir=tmp_path)
    loss, perplexity, accuracy = loss_scores(loaded, data, (Split.EVAL, Split.FINAL), seq_len=None)

    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model)
    total, count = 0.0, 0
    for split in (Split.EVAL, Split.FINAL):
        for row in load_from_disk(str(data.split_dir(split))):
            labels = torch.tensor([row["labels"]])
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([row["input_ids"]])).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).item()
            count += int((labels[:, 1:] != -100).sum())
    assert loss.value == pytest.approx(total / count, rel=1e-4)
    assert perplexity.value == pytest.approx(math.exp(loss.value))
    assert loss.low is not None
    assert loss.high is not None
    assert loss.low < loss.value < loss.high
    assert loss.num_examples == data.eval.num_examples + data.final.num_examples
    assert accuracy.metric == "eval_token_accuracy"
    assert 0.0 <= accuracy.value < 0.5


def test_a_users_function(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def one(model, tokenizer):\n    return 0.5\n"
        "def several(model, tokenizer):\n    return [1.0, 2.0, 3.0]\n"
        "def always(model, tokenizer):\n    return [True] * 60\n"
        "def wrong(model, tokenizer):\n    return object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [score.value for score in function_scores(loaded, "mine.one")] == [0.5]
    [several] = function_scores(loaded, "mine.several")
    assert (several.value, several.num_examples) == (2.0, 3)
    assert several.low == pytest.approx(2 - 4.3027 / math.sqrt(3), rel=1e-3), "Student's t of two degrees"
    [always] = function_scores(loaded, "mine.always")
    assert (always.value, always.high) == (1.0, 1.0)
    assert always.low == pytest.approx(60 / (60 + 1.96**2), rel=1e-3), "60 of 60 is not certain for ever"
    for name, words in (
        ("mine.wrong", "returned object"),
        ("mine.missing", "missing"),
        ("nowhere.x", "nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            function_scores(loaded, name)


def test_lm_eval_tasks_that_exist_and_do_not(
    loaded: LoadedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the optional part 'eval' is not installed")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "\n".join(
            json.dumps({"q": f"Is {n} even?", "choices": [" yes", " no"], "a": n % 2}) for n in range(10)
        )
    )
    (tmp_path / "even.yaml").write_text(
        "task: even_numbers\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {questions}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    scores = task_scores(loaded, "even_numbers", limit=None, batch_size=2, task_folder=tmp_path)
    [accuracy] = [score for score in scores if score.metric == "even_numbers acc"]
    assert 0.0 <= accuracy.value <= 1.0
    assert accuracy.num_examples == 10
    assert accuracy.low is not None
    assert accuracy.low < accuracy.value or accuracy.value == 0.0
    assert capfd.readouterr().err == "", "progress bars and warnings in a pipe"
    with pytest.raises(UserError, match="no such task"):
        task_scores(loaded, "odd_numbers", limit=None, batch_size=2, task_folder=tmp_path)


def test_batches_fit_by_the_models_own_shape(loaded: LoadedModel) -> None:
    config = loaded.model.config
    one = bytes_per_sequence(config, num_tokens=100, dtype_bytes=4)
    assert one > 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 100 * 4
    assert batch_that_fits(config, free_bytes=5 * one, num_tokens=100, dtype_bytes=4) == 5
    assert batch_that_fits(config, free_bytes=0, num_tokens=100, dtype_bytes=4) == 1
    assert batch_that_fits(config, free_bytes=1 << 50, num_tokens=100, dtype_bytes=4) == 64


def test_the_command_writes_json_and_refuses_what_it_cannot_score(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "XDG_DATA_HOME", str(tmp_path))
    text = tmp_path / "held_out.txt"
    text.write_text("One two three four. " * 300)  # more than one window
    assert main(["evaluate", str(model), "--metric", "perplexity", "--data", str(text), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["metric"] == "eval_perplexity", "its earlier name is taken, and it has one name"
    assert row["low"] < row["value"] < row["high"]
    assert main(["evaluate", str(model), "--metric", "eval_loss"]) == 2
    assert "belongs to no study" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nothing"), "--metric", "ifeval"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.fixture
def compared(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`autosft evaluate` on a model, the same a little changed, and an adapter over it, on chats."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(os.environ, "XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.05)
    changed.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "changed")
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(tmp_path / "adapter")
    folders = [str(model), str(tmp_path / "changed"), str(tmp_path / "adapter")]
    data = str(write_chats(tmp_path / "mine.jsonl"))
    return ["evaluate", *folders, "--metric", "eval_loss", "--metric", "eval_token_accuracy", "--data", data]


def test_models_are_compared_in_one_command_and_the_finished_ones_are_kept(
    compared: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*compared, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    base, changed, adapter = (row for row in rows if row["metric"] == "eval_loss")
    assert base["over_first"] is None
    gain = changed["over_first"]["gain"]
    assert gain["value"] == pytest.approx(base["value"] - changed["value"], abs=1e-6)
    unpaired = changed["high"] - changed["low"]
    assert gain["high"] - gain["low"] < unpaired, "paired, it is more certain"
    assert adapter["over_first"]["gain"]["value"] == pytest.approx(0.0, abs=1e-6), "it has not learned yet"
    assert adapter["kind"] == "adapter"
    # What is done is not done again, also where a later model stops the command.
    from autosft.workers.scoring import saved_models

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(saved_models, "load", refuse)
    assert main(compared) == 0
    out, err = capsys.readouterr()
    assert "scored before" in err
    assert "Paired: the same examples" in out
    assert "against the first: lower by 0 ± 0 nats per token, no better or worse beyond chance" in err
    assert main([*compared, "--again"]) == 1
    assert "scored again" in capsys.readouterr().err


def test_all_models_are_looked_at_before_one_is_scored(
    compared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autosft.workers.scoring import saved_models

    monkeypatch.setattr(saved_models, "load", lambda *_, **__: pytest.fail("scored"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert main([compared[0], str(broken), *compared[1:]]) == 2
    assert main([*compared[:3], str(broken), *compared[3:]]) == 2
    assert str(broken) in capsys.readouterr().err
    assert main([*compared, "--metric", "python:nowhere.at_all"]) == 2
    assert "no module nowhere" in capsys.readouterr().err
