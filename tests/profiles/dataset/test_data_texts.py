"""Completions and plain text: what of them is scored, and how text is packed into blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from autosft.profiles.dataset import (
    DataFormat,
    Split,
    prepare,
)
from autosft.profiles.dataset.formats import Completion, Passage
from autosft.profiles.dataset.prepared import IGNORED
from autosft.profiles.dataset.split import cut_passages
from autosft.profiles.dataset.tokens import pack, tokenize_completions
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import Write, jsonl, rows, texts
from tests.profiles.dataset.small_tokenizer import (
    llama_like_tokenizer,
    make_tokenizer,
)


def test_completions_score_the_completion_and_its_end(write: Write, plain_model: str, cache: Path) -> None:
    """Also where one token would hold letters of both: "...answ" + "er is"."""
    pairs = [("The answ", "er is four"), ("Two plus two is ", "four"), ("Say:\n", " a b ")]
    records = [{"prompt": f"{n} {asked}", "completion": told} for n in range(10) for asked, told in pairs]
    prepared = prepare(write("a.jsonl", jsonl(records)), model=plain_model, cache_dir=cache)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)

    assert prepared.format is DataFormat.PROMPT_COMPLETION
    expected = {f"{record['prompt']}|{record['completion']}</s>" for record in records}
    for split in Split:
        for row in rows(prepared, split):
            cut = row["first_label"]
            assert IGNORED not in row["labels"][cut:]
            parts = (tokenizer.decode(ids) for ids in (row["input_ids"][:cut], row["input_ids"][cut:]))
            prompt, completion = parts
            # White space between the two may stand in the completion's first token.
            whole = f"{prompt}{completion}"
            assert any(whole == each.replace("|", "") for each in expected)
            assert any(
                completion.strip() == each.split("|")[1].strip()
                and prompt.strip() == each.split("|")[0].strip()
                for each in expected
            )


def test_text_is_packed_into_blocks_of_which_every_token_is_scored(
    write: Write, plain_model: str, cache: Path
) -> None:
    documents = [f"Document {n} speaks of the rain in Paris, {n} times. " * 3 for n in range(60)]
    data = write("a.jsonl", jsonl([{"text": text} for text in documents]))
    prepared = prepare(data, model=plain_model, cache_dir=cache, block_size=32)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)

    whole = ""
    for split in Split:
        blocks = rows(prepared, split)["input_ids"]
        assert rows(prepared, split)["labels"] == blocks
        assert {len(block) for block in blocks[:-1]} == {32}
        assert len(blocks[-1]) <= 32
        whole += tokenizer.decode([token for block in blocks for token in block])
    assert sorted(whole.removesuffix("</s>").split("</s>")) == sorted(documents)
    assert prepared.notes == ()


def test_end_tokens_mark_where_the_text_does_not_continue() -> None:
    """The third part of the first document is missing: held out, say."""
    tokenizer = make_tokenizer()
    parts = [(0, 0, "one "), (0, 1, "two"), (0, 3, "four"), (1, 0, "five")]
    passages = [Passage(where="x", text=text, document=number, part=part) for number, part, text in parts]

    (block,) = pack(tokenizer, passages, 1000)

    assert tokenizer.decode(block.input_ids) == "one two</s>four</s>five</s>"


def test_a_tokenizer_that_starts_texts_starts_documents_too() -> None:
    tokenizer = llama_like_tokenizer("none: our own")
    passages = [
        Passage(where="x", text=text, document=number)
        for number, text in enumerate(("The rain", "The answer"))
    ]

    (block,) = pack(tokenizer, passages, 1000)
    (pair,) = tokenize_completions(
        tokenizer, [Completion(where="x", prompt="The rain", completion=" in Paris")]
    )

    assert tokenizer.decode(block.input_ids) == "<s> The rain</s><s> The answer</s>"
    assert tokenizer.decode(pair.input_ids) == "<s> The rain in Paris</s>"
    assert tokenizer.decode(pair.labels[pair.labels != IGNORED]) == "in Paris</s>"


def test_one_long_text_is_held_out_in_parts(write: Write, plain_model: str, cache: Path) -> None:
    lines = [f"Line {n} of a long book.\n" for n in range(2000)]
    prepared = prepare(write("book.txt", "".join(lines)), model=plain_model, cache_dir=cache, block_size=64)

    found = {
        split: [line for text in ["".join(texts(prepared, split))] for line in text.splitlines()]
        for split in Split
    }
    numbers = sorted(
        line.removeprefix("</s>") for split in Split for line in found[split] if line not in ("", "</s>")
    )
    assert numbers == sorted(line.strip() for line in lines)
    assert len(found[Split.TRAIN]) > 1500


def test_text_longer_than_the_model_is_refused(write: Write, plain_model: str, cache: Path) -> None:
    with pytest.raises(UserError, match="longer than the model's longest, 64"):
        prepare(write("a.txt", "x"), model=plain_model, cache_dir=cache, block_size=128, max_positions=64)


@given(
    documents=st.lists(st.text(alphabet="ab \n日", min_size=1, max_size=3000), min_size=1, max_size=4),
    block_size=st.sampled_from([2, 64, 1024]),
)
@settings(deadline=None)
def test_passages_are_the_documents_in_pieces(documents: list[str], block_size: int) -> None:
    passages = cut_passages([Passage(where="x", text=text) for text in documents], block_size)

    for number, text in enumerate(documents):
        parts = [passage for passage in passages if passage.document == number]
        assert "".join(passage.text for passage in parts) == text
        assert [passage.part for passage in parts] == list(range(len(parts)))
