"""Guide 1 end to end, shrunk: a SmolLM2-shaped model, real chats, strategies A, B and minimal, IFEval."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.chat_model import make_chat_model
from tests.cli.command import run

pytest.importorskip("lm_eval", reason="the optional part 'eval' is not installed")

SHARED = Path(os.environ.get("AUTOSFT_SHARED", Path(__file__).parents[4] / "shared"))
CHATS = SHARED / "data" / "glaive_toolcall_en_demo.json"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHATS.is_file(), reason="the shared data is not beside this checkout (AUTOSFT_SHARED)"
    ),
]

PROMPTS = [
    {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]},
    {
        "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
        "kwargs": [{"relation": "less than", "num_words": 40}, {}],
    },
]


def test_the_guide_is_one_command_and_its_checkpoints_are_compared(tmp_path: Path) -> None:
    rows = [
        row
        for row in json.loads(CHATS.read_text())
        if all(t["from"] in ("human", "gpt") for t in row["conversations"])
    ]
    chats = [{"conversations": row["conversations"]} for row in rows[:100]]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    texts = [turn["value"] for row in chats for turn in row["conversations"]]
    model = make_chat_model(tmp_path / "smol", texts)
    prompts = [
        {"key": at, "prompt": f"Write something short, number {at}.", **PROMPTS[at % 3]} for at in range(9)
    ]
    (tmp_path / "ifeval.json").write_text(json.dumps(prompts))

    command = [
        *("tune", "--preset", "laptop-8gb", "--model", str(model), "--data", str(tmp_path / "chats.json")),
        *("--metric", "ifeval", "--ifeval-data", str(tmp_path / "ifeval.json"), "--ifeval-new-tokens", "8"),
        *("--target", "ifeval=2", "--trials", "4", "--max-train-samples", "40", "--epochs", "1"),
        *("--evaluations", "2", "--hardware", "cpu", "--study", "guide", "--json"),
    ]
    events = run(tmp_path, *command)
    [opened] = [event for event in events if event["event"] == "study_opened"]
    plan = "\n".join(opened["plan_lines"])
    assert "A (steady): lr 4e-5" in plan
    assert "seq_len 512 instead of 1024" in plan  # the shrunk model's longest
    assert "at most 4 rounds cuts" in plan
    assert "activation checkpointing:" in plan
    assert "IFEval: 9 prompts" in plan
    started = [event["record"]["origin"] for event in events if event["event"] == "trial_started"]
    assert started[:4] == ["laptop-8gb A", "laptop-8gb B", "laptop-8gb minimal", "default"]
    measured = [
        dict(event["measurement"]["metrics"])
        for event in events
        if event["event"] == "trial_measured" and event["measurement"]["evaluation"] is not None
    ]
    assert len(measured) >= 4  # every saved checkpoint
    assert all({"ifeval", "ifeval_inst_loose", "eval_loss"} <= item.keys() for item in measured)
    conclusion = events[-1]
    assert conclusion["num_finished"] == 4

    [row, *_] = table = run(
        tmp_path,
        *("evaluate", conclusion["best_checkpoint"], "--metric", "ifeval", "--metric", "eval_loss"),
        *("--ifeval-data", str(tmp_path / "ifeval.json"), "--ifeval-new-tokens", "8", "--json"),
    )
    assert row["study"] == "guide"
    assert row["value"] == pytest.approx(conclusion["best_value"])  # the same answers to the same prompts
    assert row["low"] <= row["value"] <= row["high"]
    assert {item["metric"] for item in table} >= {"ifeval", "ifeval_prompt_loose", "eval_loss"}

    *_, again = run(
        tmp_path,
        *("train", conclusion["best_yaml"], "--hardware", "cpu", "--output", str(tmp_path / "again")),
        "--json",
    )
    assert again["metric"] == "ifeval"
    assert again["value"] == pytest.approx(again["expected_value"])
    assert Path(again["checkpoint"]).is_dir()
