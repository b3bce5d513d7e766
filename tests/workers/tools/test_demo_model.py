from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from autosft.profiles.dataset.demo import demo_examples, is_correct, pretraining_notes
from autosft.workers.scoring.inference_server import answer
from autosft.workers.tools import demo_model


@pytest.fixture(scope="module")
def hardly_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model folder after three steps of pre-training instead of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "_NUM_STEPS", 3)
        return demo_model.ensure_demo_model(tmp_path_factory.mktemp("cache"), num_threads=1)


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_NUM_STEPS", 1)


def test_the_folder_is_an_ordinary_model(hardly_trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hardly_trained)
    tokenizer = AutoTokenizer.from_pretrained(hardly_trained)
    assert model.config.model_type == "llama"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


@pytest.mark.slow
def test_the_tokenizer_gives_every_text_back(hardly_trained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hardly_trained)
    texts = [message["content"] for item in islice(demo_examples(7), 300) for message in item["messages"]]
    texts += [text for note in islice(pretraining_notes(7), 300) for text in note]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert not any(tokenizer.unk_token_id in identifier for identifier in ids)


def test_the_template_marks_what_the_assistant_says_with_its_end(hardly_trained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hardly_trained)
    for example in islice(demo_examples(0), 100):
        whole = tokenizer.apply_chat_template(
            example["messages"], return_assistant_tokens_mask=True, return_dict=True
        )
        learned = [
            id_ for id_, mask in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if mask
        ]
        said = [item["content"] for item in example["messages"] if item["role"] == "assistant"]
        assert learned == [id_ for text in said for id_ in (*tokenizer.encode(text), tokenizer.eos_token_id)]


def test_a_prompt_is_the_beginning_of_the_whole_chat(hardly_trained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hardly_trained)
    for example in islice(demo_examples(0), 100):
        messages = example["messages"]
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert whole[: len(prompt)] == prompt


@pytest.mark.usefixtures("one_step")
def test_the_second_call_finds_what_the_first_made(tmp_path: Path) -> None:
    heard: list[float] = []
    first = demo_model.ensure_demo_model(tmp_path, num_threads=1, progress=heard.append)
    weights = (first / "model.safetensors").stat()
    assert heard == sorted(heard)
    assert heard[-1] == 1.0

    heard.clear()
    assert demo_model.ensure_demo_model(tmp_path, num_threads=1, progress=heard.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert heard == [1.0]
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.mark.usefixtures("one_step")
def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    """While one makes the model, another has finished: its folder stays as it is."""
    theirs: list[Path] = []

    def meanwhile(share: float) -> None:
        if share < 1.0 and not theirs:
            theirs.append(demo_model.ensure_demo_model(tmp_path, num_threads=1))
            (theirs[0] / "theirs").touch()

    mine = demo_model.ensure_demo_model(tmp_path, num_threads=1, progress=meanwhile)
    assert [mine] == theirs
    assert (mine / "theirs").exists()
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]


@pytest.mark.usefixtures("one_step")
def test_an_interrupted_making_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model.ensure_demo_model(tmp_path, num_threads=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_step")
def test_the_callers_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    before = torch.get_rng_state()
    demo_model.ensure_demo_model(tmp_path, num_threads=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pretraining_teaches_the_words_but_no_instruction(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model.ensure_demo_model(tmp_path, num_threads=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for opening, continuation in islice(pretraining_notes(1), 200):
        given, ids = tokenizer.encode(opening), tokenizer.encode(continuation)
        labels = [-100] * len(given) + ids
        with torch.no_grad():
            losses.append(
                model(input_ids=torch.tensor([given + ids]), labels=torch.tensor([labels])).loss.item()
            )
    assert sum(losses) / len(losses) < 1.5  # a guess among the things alone costs ln 48 = 3.9

    examples = list(islice(demo_examples(1), 100))
    answers = answer(str(folder), [example["messages"][:-1] for example in examples], max_new_tokens=16)
    assert sum(is_correct(one, text) for one, text in zip(examples, answers, strict=True)) <= 5
