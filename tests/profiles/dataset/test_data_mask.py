"""The mask of scored tokens for real chat templates, against what is known of each and trl's marks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autosft.profiles.dataset.chat import render
from autosft.profiles.dataset.formats import Conversation
from autosft.profiles.dataset.prepared import IGNORED
from autosft.profiles.dataset.template import ChatTemplate, RenderError, adapted, chat_template, notes
from autosft.profiles.dataset.tokens import Tokenized, tokenize_chats
from autosft.profiles.errors import UserError
from tests.profiles.dataset.small_tokenizer import (
    TEMPLATES,
    facts_of,
    llama_like_tokenizer,
    make_tokenizer,
    template_text,
    tokenizer_for,
    training_template_text,
)

NAMES = [facts["name"] for facts in TEMPLATES]
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "City"}},
            },
        },
    },
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def conversation(*messages: dict[str, Any], tools: tuple[Any, ...] = ()) -> Conversation:
    learned = tuple(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Conversation(where="test", messages=messages, tools=tools, learned=learned)


def weather_with_tool() -> Conversation:
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
    }
    return conversation(
        user("Weather in Paris?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "rain", "tool_call_id": "call00000", "name": "get_weather"},
        assistant("It rains."),
        user("Thanks"),
        assistant("Welcome"),
        tools=TOOLS,
    )


def tokenize(template: ChatTemplate, example: Conversation) -> list[Tokenized]:
    made = tokenize_chats(template.tokenizer, render(template, example), decode_every=1)
    for each in made:
        assert isinstance(each, Tokenized), each
    return made  # type: ignore[return-value]


def runs(tokenizer: Any, example: Tokenized, *, scored: bool) -> list[str]:
    """The texts of the runs of tokens that are scored, or of those that are not."""
    texts, run = [], []
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) is scored:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts + ([tokenizer.decode(run)] if run else [])


def scored_answers(facts: dict[str, Any], template: ChatTemplate, example: Conversation) -> list[str]:
    """What is scored, without the template's own head and end, which must be there on every answer."""
    answers = []
    for made in tokenize(template, example):
        for run in runs(template.tokenizer, made, scored=True):
            start, end = facts.get("start", ""), facts["end"]
            assert run.startswith(start)
            assert run.endswith(end), (run, end)
            answers.append(run[len(start) : -len(end)].strip())
    return answers


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_their_ends_are_scored_and_nothing_else(name: str) -> None:
    facts = facts_of(name)
    template = chat_template(tokenizer_for(facts), name)
    talk = conversation(
        system("Be brief."), user("What is two plus two?"), assistant("four"), user("ok"), assistant("ok")
    )

    assert scored_answers(facts, template, talk) == ["four", "ok"]

    (first, *_) = tokenize(template, talk)
    unscored = "".join(runs(template.tokenizer, first, scored=False))
    for content in ("Be brief.", "What is two plus two?"):
        assert content in unscored
    assert template.renders_system == facts["system"]


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_scored_and_results_are_not(name: str) -> None:
    facts = facts_of(name)
    template = chat_template(tokenizer_for(facts), name)
    talk = weather_with_tool()
    as_text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

    assert template.renders_calls == facts["tools"]
    assert scored_answers(facts, template, talk) == [facts.get("call", as_text), "It rains.", "Welcome"]

    last = tokenize(template, talk)[-1]
    unscored = "".join(runs(template.tokenizer, last, scored=False))
    for content in ("Weather in Paris?", "rain", "Weather of a city"):
        assert content in unscored
    if not facts["tools"]:
        assert any("no tool calls" in note for note in notes(template, has_system=False, has_tools=True))


# Letters of one to four bytes, white space at the ends, and pieces of tags, but too few letters for a control
# token, which in the content would be one.
CONTENT = st.text(
    alphabet=st.sampled_from("aoet k.,!?\n\t'\"0é日😀#*_-:<>|/[]"), min_size=1, max_size=30
).filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("name", NAMES)
@given(rounds=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mask_holds_for_any_content(name: str, rounds: list[tuple[str, str]]) -> None:
    facts = facts_of(name)
    template = _cached_template(name)
    talk = conversation(*(turn for asked, told in rounds for turn in (user(asked), assistant(told))))

    assert scored_answers(facts, template, talk) == [told.strip() for _, told in rounds]
    assert len(tokenize(template, talk)) == (len(rounds) if facts.get("rewrites") else 1)


@pytest.mark.parametrize("name", ["Llama 2", "Mistral 7B Instruct v0.1", "Zephyr", "none: our own"])
def test_mask_holds_with_a_tokenizer_that_writes_spaces_as_letters(name: str) -> None:
    facts = facts_of(name)
    template = chat_template(llama_like_tokenizer(name), name)
    talk = conversation(
        user("What is two  plus two?"), assistant(" four  😀日\nor five"), user("ok"), assistant("ok")
    )

    assert scored_answers(facts, template, talk) == ["four  😀日\nor five", "ok"]
    (made,) = tokenize(template, talk)
    assert made.input_ids[:2].tolist().count(template.tokenizer.bos_token_id) == (name != "Zephyr")


@pytest.mark.parametrize("name", [facts["name"] for facts in TEMPLATES if facts["name"] != "DeepSeek V3"])
def test_what_precedes_the_last_answer_is_the_prompt_that_the_model_will_be_given(name: str) -> None:
    """DeepSeek V3 asks with a <think> that its history lacks."""
    facts = facts_of(name)
    template = _cached_template(name)
    tokenizer = template.tokenizer
    asked = [user("What is two plus two?"), assistant("four"), user("And three?")]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, chat_template=template.own or template_text(facts)
    )["input_ids"]

    last = tokenize(template, conversation(*asked, assistant("six")))[-1]

    assert last.input_ids[: len(prompt)].tolist() == prompt
    assert (last.labels[len(prompt) - 1], last.labels[len(prompt)]) == (IGNORED, last.input_ids[len(prompt)])


# Of trl's templates those whose training variant writes the same text as the original.
MARKED_BY_TRL = ["qwen2_5", "gemma", "llama3", "phi3", "phi3_5", "cohere", "qwen3_instruct_2507", "lfm2_v2"]


@pytest.mark.parametrize("name", MARKED_BY_TRL)
def test_mask_agrees_with_the_marks_that_trl_set_by_hand(name: str) -> None:
    tokenizer = make_tokenizer(
        chat_template=template_text({"trl": name}),
        eos="<|endoftext|>",
        special=(
            "<|im_start|>",
            "<|im_end|>",
            "<end_of_turn>",
            "<|eot_id|>",
            "<|end|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
    )
    talk = [user("What is two plus two?"), assistant("four"), user("And three?"), assistant("six, I think")]
    marked = tokenizer.apply_chat_template(
        talk, chat_template=training_template_text(name), return_assistant_tokens_mask=True
    )

    (ours,) = tokenize(chat_template(tokenizer, name), conversation(*talk))

    assert ours.input_ids.tolist() == marked["input_ids"]
    scored = set(np.flatnonzero(ours.labels != IGNORED).tolist())
    theirs = {position for position, mark in enumerate(marked["assistant_masks"]) if mark}
    assert scored <= theirs
    # trl also scores the line end around an answer, and the end of the whole text in Phi-3.
    for position in theirs - scored:
        assert tokenizer.decode([marked["input_ids"][position]]) in ("\n", "<|endoftext|>")


def test_answers_that_a_template_rewrites_later_are_learned_as_they_are_written_last() -> None:
    template = _cached_template("Qwen 3")
    talk = conversation(
        user("Two plus two?"),
        assistant("<think>\n2 + 2\n</think>\n\nfour"),
        user("plus one?"),
        assistant("<think>\n4 + 1\n</think>\n\nfive"),
    )

    first, second = tokenize(template, talk)

    assert runs(template.tokenizer, first, scored=True) == ["<think>\n2 + 2\n</think>\n\nfour<|im_end|>"]
    assert runs(template.tokenizer, second, scored=True) == ["<think>\n4 + 1\n</think>\n\nfive<|im_end|>"]
    assert "2 + 2" not in template.tokenizer.decode(second.input_ids)


def test_a_template_that_moves_the_system_turn_to_the_last_question_gives_one_example_an_answer() -> None:
    """As Mistral's templates from v0.3 on do: what precedes the first answer changes with the second."""
    moving = (
        "{{ bos_token }}{% set ns = namespace(last=0) %}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.index0 == ns.last and messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\n' }}{% endif %}{{ message['content'] + '[/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    template = chat_template(make_tokenizer(chat_template=moving), "x")
    talk = conversation(system("Be brief."), user("one"), assistant("eins"), user("two"), assistant("zwei"))

    decoded = [
        (template.tokenizer.decode(made.input_ids), runs(template.tokenizer, made, scored=True))
        for made in tokenize(template, talk)
    ]

    assert decoded == [
        ("<s>[INST] Be brief.\none[/INST] eins</s>", [" eins</s>"]),
        ("<s>[INST] one[/INST] eins</s>[INST] Be brief.\ntwo[/INST] zwei</s>", [" zwei</s>"]),
    ]


def test_thinking_that_a_template_drops_is_refused() -> None:
    facts = {"trl": "deepseek_r1_distill"}
    template = chat_template(make_tokenizer(chat_template=template_text(facts)), "R1")

    with pytest.raises(RenderError, match="does not show the whole answer: '2 plus 2'"):
        render(template, conversation(user("Two plus two?"), assistant("<think>2 plus 2</think>four")))


def test_marks_that_leave_an_answer_out_are_not_trusted() -> None:
    """A template that marks only the last answer: the others are found by rendering."""
    marked = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' and loop.last %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = chat_template(
        make_tokenizer(chat_template=marked, special=("<|im_start|>", "<|im_end|>")), "x"
    )
    talk = conversation(user("one"), assistant("eins"), user("two"), assistant("zwei"))

    (made,) = tokenize(template, talk)

    assert runs(template.tokenizer, made, scored=True) == ["eins<|im_end|>", "zwei<|im_end|>"]


def test_marks_around_everything_are_refused() -> None:
    """Everything marked is everything scored, the question too."""
    marked = (
        "{% generation %}{% for message in messages %}"
        "{{ message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}{% endgeneration %}"
    )
    template = chat_template(make_tokenizer(chat_template=marked), "x")

    (problem,) = tokenize_chats(
        template.tokenizer, render(template, conversation(user("one"), assistant("eins"))), decode_every=1
    )

    assert "every token is scored" in str(problem)


def test_marks_around_the_question_are_refused() -> None:
    marked = (
        "{{ bos_token }}{% generation %}{% for message in messages %}"
        "{{ message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}{% endgeneration %}"
    )
    template = chat_template(make_tokenizer(chat_template=marked), "x")

    (problem,) = tokenize_chats(
        template.tokenizer, render(template, conversation(user("one"), assistant("eins"))), decode_every=1
    )

    assert "'one' is scored, but is no answer" in str(problem)


def test_a_template_without_generation_prompt_does_not_score_the_header() -> None:
    plain = (
        "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
        "{% endfor %}"
    )
    template = chat_template(make_tokenizer(chat_template=plain), "x")

    (made,) = tokenize(template, conversation(user("one"), assistant("eins"), user("two"), assistant("zwei")))

    assert runs(template.tokenizer, made, scored=True) == ["eins</s>", "zwei</s>"]


def test_short_answers_that_recur_in_the_template_are_found_where_they_stand() -> None:
    """Phi-3 ends a conversation with <|end|> and <|endoftext|>: an "o" is in there too."""
    template = _cached_template("Phi-3")

    (made,) = tokenize(template, conversation(user("0"), assistant("o")))

    assert runs(template.tokenizer, made, scored=True) == ["o<|end|>"]


def test_a_last_character_of_several_tokens_is_scored_whole() -> None:
    endless = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    template = chat_template(make_tokenizer(chat_template=endless), "x")

    (made,) = tokenize(template, conversation(user("one"), assistant("ok 😀"), user("two"), assistant("日")))

    assert runs(template.tokenizer, made, scored=True) == ["ok 😀", "日"]
    assert "cannot learn where to stop" in notes(template, has_system=False, has_tools=False)[0]


def test_only_answers_with_weight_are_scored() -> None:
    template = _cached_template("ChatML")
    talk = conversation(user("one"), assistant("eins"), user("two"), assistant("zwei"))

    for learned, expected in (((1,), ["eins<|im_end|>"]), ((3,), ["zwei<|im_end|>"])):
        chosen = Conversation(where="test", messages=talk.messages, learned=learned)
        (made,) = tokenize(template, chosen)
        assert runs(template.tokenizer, made, scored=True) == expected


def test_system_turns_are_folded_with_a_remark_if_unsupported() -> None:
    template = _cached_template("Gemma")
    talk = conversation(system("Be brief."), user("one"), assistant("eins"))

    assert adapted(template, talk) == [user("Be brief.\n\none"), assistant("eins")]
    (said,) = notes(template, has_system=True, has_tools=False)
    assert "has no system turn" in said


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for message in messages %}{{ message['text'] }}{% endfor %}", "does not show a question"),
        ("{{ raise_exception('no chat') }}", "cannot render a question and its answer: no chat"),
        ("{% for message in messages %}", "cannot render a question and its answer"),
    ],
    ids=["shows nothing", "raises", "broken"],
)
def test_a_template_that_cannot_work_is_one_clear_error(jinja: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat_template(make_tokenizer(chat_template=jinja), "my-model")


def test_neither_template_nor_end_token_is_an_error() -> None:
    with pytest.raises(UserError, match="neither a chat template nor an end-of-sequence token"):
        chat_template(make_tokenizer(eos=None), "my-model")


def test_a_turn_order_that_a_template_refuses_is_a_bad_record() -> None:
    with pytest.raises(RenderError, match="must alternate"):
        render(_cached_template("Gemma"), conversation(user("one"), user("two"), assistant("zwei")))


_TEMPLATES: dict[str, ChatTemplate] = {}


def _cached_template(name: str) -> ChatTemplate:
    if name not in _TEMPLATES:
        _TEMPLATES[name] = chat_template(tokenizer_for(facts_of(name)), name)
    return _TEMPLATES[name]
