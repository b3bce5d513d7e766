"""A chat template that writes today's date writes the same one on any day and under any locale."""

from __future__ import annotations

import datetime
import json
import locale
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.dataset import prepare
from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.dataset.template_date import parse_date, pin_date, recorded_date, with_date
from autosft.profiles.errors import UserError
from tests.profiles.dataset.small_tokenizer import make_tokenizer

DAYS = ("2026-11-30", "2024-02-29", "2027-01-01", "2025-05-04", "2000-01-09")
#: All that a date has a say in, and codes of the time, which is midnight's.
FORMATS = (
    *("%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%A, %-d %B", "%a %e. %h '%y", "%j day, week %U %W %V %G", "%%d"),
    *(
        "%H:%M:%S.%f",
        "%I %p",
        "%D",
        "%F",
        "%T",
        "%R",
        "%u %w",
        "%C",
        "%-m/%-d/%-y",
        "100 %% on %d",
        "no code",
    ),
)
CHATS = [
    [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}] for n in range(40)
]
TEMPLATE = (
    "\n{{ strftime_now('%d %B %Y') }} {% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Have it be another day, for us and for transformers' own `strftime_now`."""

    def set_day(day: str) -> None:
        noon = datetime.datetime.fromisoformat(f"{day}T12:00")

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return noon

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        # the package has a function of this module's name
        monkeypatch.setattr(sys.modules["autosft.profiles.dataset.prepare"], "today", lambda: day)

    return set_day


def rendered(template: str) -> str:
    tokenizer = make_tokenizer(chat_template=template)
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))


@pytest.mark.parametrize("day", DAYS)
def test_every_code_of_a_date_is_written_as_strftime_writes_it(day: str) -> None:
    midnight = datetime.datetime.fromisoformat(day)
    template = "".join(f"[{{{{ strftime_now({code!r}) }}}}]" for code in FORMATS)
    assert rendered(with_date(template, day)) == "".join(f"[{midnight.strftime(code)}]" for code in FORMATS)


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_real_templates_that_write_the_date(name: str, at: Any) -> None:
    """What is pinned is what the template writes on that day, and nothing else of it changes."""
    template = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
    at("2026-11-30")
    that_day = rendered(template)
    at("2027-03-09")
    assert rendered(template) != that_day, "the example has lost its point"
    assert rendered(with_date(template, "2026-11-30")) == that_day


@pytest.mark.parametrize(
    "template",
    [
        "\n\n  {{ strftime_now('%Y') }}",
        "  {% if true %}\n{{ strftime_now('%Y') }}{% endif %}\n",
        "{{ strftime_now('%Y') }}\n\n",
    ],
)
def test_space_around_a_template_stays(template: str, at: Any) -> None:
    at("2026-11-30")
    assert rendered(with_date(template, "2026-11-30")) == rendered(template)


def test_names_of_months_are_english_under_any_locale() -> None:
    before = locale.setlocale(locale.LC_TIME)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8", "C"):
        try:
            locale.setlocale(locale.LC_TIME, name)
        except locale.Error:
            continue
        try:
            assert (
                rendered(with_date("{{ strftime_now('%A %B %b %p') }}", "2026-03-01"))
                == "Sunday March Mar AM"
            )
        finally:
            locale.setlocale(locale.LC_TIME, before)


@pytest.mark.parametrize("given", ["30.11.2026", "today", "2026-13-01", ""])
def test_what_is_no_date_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="is not a date"):
        parse_date(given)


# Prepared data


def prepared(folder: Path, model: Path, cache: str, **options: Any) -> PreparedData:
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return prepare(str(data), model=str(model), cache_dir=folder / cache, **options)


def first_text(data: PreparedData) -> str:
    return "".join(text for text, _ in data.samples[0])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def test_the_date_is_part_of_the_data(tmp_path: Path, model: Path, at: Any) -> None:
    """Another day's data are others, the same day's the same, and it is said which."""
    at("2026-11-30")
    first = prepared(tmp_path, model, "a")
    at("2026-12-01")
    next_day, again = (
        prepared(tmp_path, model, "a"),
        prepared(tmp_path, model, "b", template_date="2026-11-30"),
    )
    assert (first.template_date, next_day.template_date, again.template_date) == (
        *("2026-11-30", "2026-12-01", "2026-11-30"),
    )
    assert first.fingerprint == again.fingerprint != next_day.fingerprint
    assert "30 November 2026" in first_text(first)
    assert first_text(first) == first_text(again)
    assert "01 December 2026" in first_text(next_day)
    assert any("2026-11-30" in note and "--template-date" in note for note in again.notes)


def test_data_prepared_before_are_found_again(tmp_path: Path, model: Path, at: Any) -> None:
    at("2026-11-30")
    first = prepared(tmp_path, model, "a")
    at("2026-12-24")
    known = [("0" * 64, "2020-01-01"), (first.fingerprint, "2026-11-30")]
    assert prepared(tmp_path, model, "b", known_dates=lambda: known).fingerprint == first.fingerprint
    asked = prepared(tmp_path, model, "b", known_dates=lambda: known, template_date="2026-12-24")
    assert asked.template_date == "2026-12-24"


def test_a_template_without_a_date_has_none(tmp_path: Path) -> None:
    make_tokenizer(chat_template=TEMPLATE.replace("strftime_now('%d %B %Y')", "'x'")).save_pretrained(
        tmp_path / "m"
    )

    data = prepared(tmp_path, tmp_path / "m", "a", known_dates=lambda: [("another's", "2026-01-01")])
    assert data.template_date is None
    assert not [note for note in data.notes if "date" in note]


def test_a_study_of_the_version_before_keeps_the_fingerprint_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer(chat_template=TEMPLATE.replace("strftime_now('%d %B %Y')", "'x'")).save_pretrained(
        tmp_path / "m"
    )
    current = import_module("autosft.profiles.dataset.prepare")
    with monkeypatch.context() as patch:
        patch.setattr(current, "_CACHE_VERSION", current._EARLIER_CACHE_VERSION)
        before = prepared(tmp_path, tmp_path / "m", "before").fingerprint
    now = prepared(tmp_path, tmp_path / "m", "now").fingerprint
    assert now != before
    assert prepared(tmp_path, tmp_path / "m", "now", known_dates=lambda: [(before, "")]).fingerprint == before
    assert prepared(tmp_path, tmp_path / "m", "now", known_dates=lambda: [(now, "")]).fingerprint == now


def test_the_date_travels_with_the_tokenizer(tmp_path: Path, model: Path, at: Any) -> None:
    """What is written beside the data, and so with every checkpoint, keeps template and date apart."""
    from transformers import AutoTokenizer

    at("2026-11-30")
    data = prepared(tmp_path, model, "a")
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    assert tokenizer.chat_template == TEMPLATE
    assert recorded_date(tokenizer) == "2026-11-30"
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    at("2030-01-01")
    # What is prepared for the trained model is rendered as it was trained.
    assert prepared(tmp_path, tmp_path / "checkpoint", "b").template_date == "2026-11-30"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    asked = pin_date(loaded, recorded_date(loaded)).apply_chat_template(CHATS[0], tokenize=False)
    assert "30 November 2026" in asked
