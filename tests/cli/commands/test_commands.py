"""The commands that read: studies, data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft import cli
from autosft.commands.data import sample_text
from autosft.studies.store.records import Driver, open_records
from autosft.studies.trial import FailureKind, TrialState
from tests.profiles.dataset.small_tokenizer import facts_of, tokenizer_for
from tests.studies import study_examples

NAME = "tiny-llama"


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A database with one study: a good trial, a better one, one that ran out of memory, one that waits."""
    url = f"sqlite:///{tmp_path}/studies.db"
    records = open_records(url)
    study = records.open_study(study_examples.spec(NAME), now=1.0)
    study.take_over(Driver.current(), now=1.0)
    for value, state, failure in (
        (2.5, TrialState.COMPLETED, None),
        (1.5, TrialState.STOPPED, None),
        (None, TrialState.INFEASIBLE, FailureKind.OUT_OF_MEMORY),
    ):
        trial = study.ask(now=2.0).number
        attempt = study.begin_attempt(trial, plan=study_examples.PLAN, device_uuids=("GPU-1",), now=2.0)
        if value is not None:
            study.record(study_examples.evaluation(trial, attempt, 1, value), now=3.0)
        study.end_attempt(study_examples.end(trial, attempt, failure=failure), state, now=4.0)
    study.ask(now=5.0)
    study.release(now=5.0)
    records.close()
    return url


def test_studies_are_listed(storage, capsys):
    assert cli.main(["studies", "list", "--storage", storage]) == 0
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith(NAME)]
    assert f"3/{study_examples.spec().num_trials}" in row
    assert "1.5000" in row
    assert storage in out

    assert cli.main(["studies", "list", "--storage", storage, "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["study"], listed["best_value"]) == (NAME, 1.5)
    assert listed["num_by_state"] == {"completed": 1, "stopped": 1, "infeasible": 1, "waiting": 1}

    assert cli.main(["studies", "list", "--storage", storage, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{NAME}\n"


def test_a_study_is_shown_best_first(storage, capsys):
    assert cli.main(["studies", "show", NAME, "--storage", storage]) == 0
    out = capsys.readouterr().out
    states = [state for line in out.splitlines() for state in line.split()[1:2] if line[:1].isdigit()]
    assert states == ["stopped", "completed", "infeasible", "waiting"]
    assert "infeasible (out of device memory)" in out

    assert cli.main(["studies", "show", NAME, "--storage", storage, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [trial["value"] for trial in shown["trials"]][:2] == [2.5, 1.5]


def test_a_misspelt_study_is_refused_with_the_nearest(storage, capsys):
    assert cli.main(["studies", "show", NAME[:-1] + "_", "--storage", storage]) == 2
    assert f"Did you mean {NAME}?" in capsys.readouterr().err


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} plus one?"},
            {"role": "assistant", "content": f"It is {n + 1}."},
        ]
    }
    for n in range(40)
]


def test_data_show_counts_and_marks_what_is_learned(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, model = tmp_path / "chats.jsonl", tmp_path / "model"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    tokenizer_for(facts_of("Qwen 2.5")).save_pretrained(model)
    line = ["data", "show", str(file), "--model", str(model), "--samples", "1"]

    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert "OpenAI messages" in out
    [learned] = [part.split("[/learned]")[0] for part in out.split("[learned]")[1:]]
    assert learned.startswith("It is ")

    assert cli.main([*line, "--json", "--seq-len", "16"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum(shown[split]["num_examples"] for split in ("train", "eval", "final")) == len(CHATS)
    assert shown["truncation"][0]["seq_len"] == 16


def test_a_sample_is_marked_with_and_without_colour():
    spans = (("What? ", False), ("That [x].", True))
    assert sample_text(spans, has_colour=False).plain == "What? [learned]That [x].[/learned]"
    coloured = sample_text(spans, has_colour=True)
    assert coloured.plain == "What? That [x]."
    assert [str(span.style) for span in coloured.spans] == ["dim", "black on green"]


def test_a_study_is_renamed_exported_and_deleted(storage, capsys, tmp_path):
    assert cli.main(["studies", "rename", NAME, "other name", "--storage", storage]) == 0
    assert "is now other name" in capsys.readouterr().out

    file = tmp_path / "trials.csv"
    line = ["studies", "export-csv", "other name", "--storage", storage]
    assert cli.main([*line, "--output", str(file)]) == 0
    assert "4 trials" in capsys.readouterr().out
    assert cli.main(line) == 0
    assert capsys.readouterr().out == file.read_text()
    header, *rows = file.read_text().splitlines()
    assert header.startswith("trial,state,origin,eval_loss,")
    assert [row.split(",")[:4] for row in rows[:2]] == [
        ["0", "completed", "sampler", "2.5"],
        ["1", "stopped", "sampler", "1.5"],
    ]

    assert cli.main(["studies", "delete", "other name", "--storage", storage]) == 2
    assert "--yes" in capsys.readouterr().err
    assert cli.main(["studies", "delete", "other name", "--storage", storage, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == "other name"
    assert cli.main(["studies", "list", "--storage", storage, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_studies_are_compared(storage, capsys):
    records = open_records(storage)
    records.open_study(study_examples.spec("empty"), now=2.0)
    records.close()
    assert cli.main(["studies", "compare", NAME, "empty", "--storage", storage]) == 0
    out = capsys.readouterr().out
    assert "eval_loss 1.5" in out
    assert f"empty against {NAME}: not comparable" in out
    assert cli.main(["studies", "compare", NAME, "empty", "--storage", storage, "--json"]) == 0
    first, other = json.loads(capsys.readouterr().out)
    assert (first["best_value"], other["best_trial"]) == (1.5, None)
    assert cli.main(["studies", "compare", NAME, NAME, "--storage", storage]) == 2
