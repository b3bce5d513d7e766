"""Guide 2 end to end, shrunk: a block-pruned Llama on WikiText, stopped and resumed, its zeros kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.cli.command import run, start
from tests.cli.pruned_llama import SHARE, make_pruned_llama

SHARED = Path(os.environ.get("AUTOSFT_SHARED", Path(__file__).parents[4] / "shared"))
TEXT = SHARED / "data" / "wikitext2_valid.txt"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # seven commands, each a process with its own imports
    pytest.mark.skipif(
        not TEXT.is_file(), reason="the shared data is not beside this checkout (AUTOSFT_SHARED)"
    ),
]


def test_the_zeros_stay_the_perplexity_falls_and_ctrl_c_costs_nothing(tmp_path: Path) -> None:
    text = TEXT.read_text(encoding="utf-8")
    held_out, train = tmp_path / "held-out.txt", tmp_path / "train.txt"
    held_out.write_text(text[:15_000], encoding="utf-8")
    train.write_text(text[15_000:150_000], encoding="utf-8")
    model = make_pruned_llama(tmp_path / "pruned", [text[:60_000]])

    def perplexity(folder: str) -> float:
        [row] = run(
            tmp_path,
            *("evaluate", folder, "--metric", "perplexity", "--data", str(held_out), "--seq-len", "128"),
            "--json",
        )
        return float(row["value"])

    [zeros] = run(tmp_path, "check-sparsity", str(model), "--json")
    assert zeros["models"][0]["pruned_share"] == pytest.approx(SHARE, abs=1e-9)
    before = perplexity(str(model))

    command = [
        *("tune", "--model", str(model), "--data", str(train), "--block-size", "128", "--method", "sparse"),
        *("--max-train-samples", "96", "--epochs", "3", "--learning-rate", "2e-3"),
        *("--effective-batch-size", "8", "--evaluations", "3", "--trials", "1", "--hardware", "cpu"),
        *("--study", "guide", "--json"),
    ]
    stopped_at = 0
    with start(tmp_path, *command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "study_opened":
                plan = "\n".join(event["plan_lines"])
            if event["event"] == "trial_measured":
                if not stopped_at:
                    process.send_signal(signal.SIGINT)
                stopped_at = event["measurement"]["step"]
        assert process.wait() == 130, process.stderr and process.stderr.read()
    assert f"Sparsity: {SHARE:.4f} of the pruned matrices are zeros (blocks of 16x16;" in plan
    assert "they are kept" in plan
    assert 0 < stopped_at < 36

    events = run(tmp_path, *command)
    steps = [event["measurement"]["step"] for event in events if event["event"] == "trial_measured"]
    assert min(steps) == stopped_at + 1, "what was trained is not trained again"
    assert max(steps) == 36  # 3 x 96 examples by 8
    trained = events[-1]["best_checkpoint"]

    [after] = run(tmp_path, "check-sparsity", str(model), trained, "--json")
    assert after["num_lost"] == 0
    assert [item["pruned_share"] for item in after["models"]] == pytest.approx([SHARE, SHARE], abs=1e-9)
    assert perplexity(trained) < 0.5 * before
