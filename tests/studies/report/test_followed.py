"""Which instructions of which prompts were followed, before and after tuning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from autosft.profiles.dataset.ifeval_prompts import Prompt, write_prompts
from autosft.studies.files.checkpoints import prompt_scores_path, trial_dir, untuned_dir
from autosft.studies.report import render
from autosft.studies.report.followed import followed_prompts
from tests.studies.report_examples import made_up_report
from tests.studies.results.test_over_untuned import BASE, trial

NAMES = ("punctuation:no_comma", "length_constraints:number_words")
PROMPTS = tuple(
    Prompt(key=key, prompt=f"Write {key} <b>.", instructions=NAMES, arguments=({}, {})) for key in range(3)
)
BEFORE = [[True, True], [False, False], [False, True]]
AFTER = [[True, True], [True, True], [True, False]]


def saved(path: Path, flags: list[list[bool]], **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"is_raced": False, "strict": flags, "loose": flags, **more}))


def test_the_report_says_which_instructions_failed(tmp_path: Path) -> None:
    best = trial(BASE, metrics=(("ifeval", 0.5),))
    assert followed_prompts(tmp_path, best, metric="ifeval") == ()
    write_prompts(tmp_path / "ifeval.jsonl", PROMPTS)
    assert followed_prompts(tmp_path, best, metric="ifeval") == ()
    saved(prompt_scores_path(trial_dir(tmp_path, 0), 2), AFTER, answers=["a", "b", "two, words"])
    saved(prompt_scores_path(untuned_dir(tmp_path), 0), BEFORE)
    worst, first, second = followed_prompts(tmp_path, best, metric="ifeval")
    assert (worst.prompt, worst.failed, worst.change) == ("Write 2 <b>.", NAMES[1:], "")
    assert (worst.before, worst.answer) == ((False, True), "two, words")
    assert (first.change, second.change) == ("", "gained")
    page = render(dataclasses.replace(made_up_report(1), followed=(worst, first, second)))
    assert "not followed: length_constraints:number_words" in page
    assert "gained by tuning" in page
    assert "Write 2 &lt;b&gt;." in page
    assert followed_prompts(tmp_path, best, metric="eval_loss") == ()


def test_scores_of_old_versions_have_no_answers_and_cut_ones_fewer_prompts(tmp_path: Path) -> None:
    write_prompts(tmp_path / "ifeval.jsonl", PROMPTS)
    saved(prompt_scores_path(trial_dir(tmp_path, 0), 2), AFTER[:2])
    found = followed_prompts(tmp_path, trial(BASE, metrics=(("ifeval", 0.5),)), metric="ifeval")
    assert [(row.answer, row.before, row.change) for row in found] == [("", (), "")] * 2
