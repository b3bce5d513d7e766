"""The tokenizer that is loaded is the folder's own, whatever the model's type; what pads has an embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from autosft.profiles.dataset import prepare
from autosft.profiles.dataset.template import chat_template
from autosft.profiles.dataset.tokenizer import difference, fit_pad, load_tokenizer
from autosft.profiles.errors import UserError
from tests.profiles.dataset.small_tokenizer import make_tokenizer

TEXTS = ("abc123def 2024-2025 don't stop", "Hello WORLD 12345", "cafe\u0301")


def own_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces alone and writes everything in lower case, as none of transformers' classes does."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(list(TEXTS) * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")


def written(folder: Path, model_type: str, tokenizer_class: str | None) -> Path:
    own_tokenizer().save_pretrained(folder)
    AutoConfig.for_model(model_type).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["tokenizer_class"] = tokenizer_class
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5", "llama", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize(
    "tokenizer_class", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "GemmaTokenizer"]
)
def test_the_ids_are_those_of_the_file(tmp_path: Path, model_type: str, tokenizer_class: str | None) -> None:
    folder = written(tmp_path / "model", model_type, tokenizer_class)
    of_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    for text in TEXTS:
        assert loaded(text, add_special_tokens=False)["input_ids"] == of_file.encode(text).ids
    loaded.save_pretrained(tmp_path / "again")
    assert difference(Tokenizer.from_file(str(tmp_path / "again/tokenizer.json")), of_file) is None


def test_deviations_from_transformers_are_reported(tmp_path: Path) -> None:
    said: list[str] = []
    load_tokenizer(str(written(tmp_path / "a", "qwen2", "PreTrainedTokenizerFast")), say=said.append)
    assert len(said) == 1
    assert "Qwen2Tokenizer" in said[0]
    load_tokenizer(str(written(tmp_path / "b", "llama", "PreTrainedTokenizerFast")), say=said.append)
    assert len(said) == 1


def test_data_is_prepared_with_the_folders_own(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "qwen2", "PreTrainedTokenizerFast")
    data = tmp_path / "d.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n} don't", "completion": f"2024-{n}"}) + "\n" for n in range(40))
    )
    made = prepare(str(data), model=str(folder), cache_dir=tmp_path / "cache")
    assert any("Qwen2Tokenizer" in note for note in made.notes)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert difference(Tokenizer.from_file(str(made.tokenizer_dir / "tokenizer.json")), own) is None


# Text without tokens


def without_bytes(unknown: str | None) -> PreTrainedTokenizerFast:
    """Knows letters and digits alone; others become the unknown token, or nothing."""
    letters = ["</s>", *([] if unknown is None else [unknown]), *"abcdefghijklmnopqrstuvwxyz0123456789 ?"]
    raw = Tokenizer(
        models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token=unknown)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token=unknown)


NOT_KNOWN = [
    ("bytes", make_tokenizer(), ""),
    ("unknown", without_bytes("<unk>"), "40 of 320 tokens are <unk>"),
    ("lost", without_bytes(None), "40 characters are lost"),
]


@pytest.mark.parametrize(("case", "tokenizer", "says"), NOT_KNOWN, ids=[case for case, *_ in NOT_KNOWN])
def test_text_that_has_no_tokens_is_said(tmp_path: Path, case: str, tokenizer: Any, says: str) -> None:
    tokenizer.save_pretrained(tmp_path / "m")
    data = tmp_path / "d.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"q{n:02}?", "completion": "\u00e9 a"}) + "\n" for n in range(40))
    )
    made = prepare(str(data), model=str(tmp_path / "m"), cache_dir=tmp_path / "c")

    assert says in "\n".join(made.notes), case
    assert bool(made.notes) is bool(says)


def test_named_templates_without_a_default_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    with pytest.raises(UserError, match=r"'rag', 'tool_use'"):
        chat_template(tokenizer, "m")


def test_a_tokenizer_that_git_lfs_has_not_fetched_is_said_to_be_one(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(UserError, match="git lfs") as error:
        load_tokenizer(str(tmp_path))
    assert error.value.remedy == "Fetch it: git lfs pull"


# Padding


PADS = [
    # pad, embeddings, what pads; None: refused
    ("<pad>", 1000, "<pad>"),
    ("[PAD]", "all but the pad", "</s>"),
    ("[PAD]", None, "[PAD]"),
    (None, 1000, "</s>"),
    ("[PAD]", 0, None),
]


@pytest.mark.parametrize(("pad", "num_embeddings", "pads"), PADS)
def test_what_pads_has_an_embedding(pad: str | None, num_embeddings: Any, pads: str | None) -> None:
    tokenizer = make_tokenizer(bos=None, special=("<unused>", "</s>", "<pad>"), eos="</s>")
    tokenizer.add_special_tokens({} if pad is None else {"pad_token": pad})
    if num_embeddings == "all but the pad":
        num_embeddings = tokenizer.convert_tokens_to_ids("[PAD]")
    said: list[str] = []
    if pads is None:
        with pytest.raises(UserError, match=rf"{tokenizer.pad_token_id}.*0 embeddings"):
            fit_pad(tokenizer, num_embeddings, say=said.append)
        return
    fit_pad(tokenizer, num_embeddings, say=said.append)
    assert tokenizer.pad_token == pads
    assert bool(said) == (pad not in (None, pads)), said


def test_a_token_of_the_data_without_an_embedding_is_refused(tmp_path: Path) -> None:
    """Both numbers are said, before anything is trained, also where the data was prepared before."""
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "m")
    data = tmp_path / "d.jsonl"
    turns = [
        [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"<new> {n}"}]
        for n in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"id {size} .*{size} embeddings"):
            prepare(str(data), model=str(tmp_path / "m"), cache_dir=tmp_path / "c", num_embeddings=size)
    assert prepare(str(data), model=str(tmp_path / "m"), cache_dir=tmp_path / "c", num_embeddings=size + 1)


def test_a_pad_token_without_an_embedding_is_noted_with_the_data(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "m")
    data = tmp_path / "d.jsonl"
    turns = [
        [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    made = prepare(str(data), model=str(tmp_path / "m"), cache_dir=tmp_path / "c", num_embeddings=size)
    assert [note for note in made.notes if f"{size:,}" in note and "pads instead" in note]
