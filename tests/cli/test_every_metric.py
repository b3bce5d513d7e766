"""Every metric through a whole `autosft tune`, and `autosft evaluate` by the same name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from autosft.studies.metrics import METRICS, Evidence
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.command import run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

#: Other tests tune by the loss, and a perplexity is its exponential.
LIKE_OTHERS = ("eval_loss", "eval_perplexity")


def every_metric() -> Iterator[ParameterSet]:
    for name in METRICS:
        yield pytest.param(name, marks=pytest.mark.thorough if name in LIKE_OTHERS else ())


@pytest.mark.parametrize("name", [*every_metric()])
def test_a_study_by_every_metric(name: str, tmp_path: Path) -> None:
    metric = METRICS[name]
    more: list[str] = []
    if metric.evidence is Evidence.PROMPTS:
        pytest.importorskip("lm_eval", reason="the optional part 'eval' is not installed")
        prompt = {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps([{"key": key, **prompt} for key in range(4)]))
        more = ["--ifeval-data", str(prompts), "--ifeval-new-tokens", "4"]
    model = str(make_chat_model(tmp_path / "model"))
    data = str(write_chats(tmp_path / "chats.jsonl"))
    events = run(
        tmp_path,
        *(
            "tune",
            "--model",
            model,
            "--data",
            data,
            "--metric",
            name,
            *more,
            "--study",
            "by",
            "--method",
            "full",
        ),
        *("--trials", "3", "--epochs", "1", "--evaluations", "2", "--effective-batch-size", "8"),
        *("--learning-rate", "1e-5..1e-2 log", "--no-prune", "--hardware", "cpu", "--json"),
    )
    conclusion = events[-1]
    assert (conclusion["metric"], conclusion["minimize"]) == (name, metric.minimize)
    values = [
        value
        for event in events
        if event["event"] == "trial_measured"
        and (value := dict(event["measurement"]["metrics"]).get(name)) is not None
    ]
    assert len(values) == 6, "every evaluation of every trial measures it"
    assert f" {name} " in conclusion["choice"]
    assert " ± " in conclusion["choice"], "with its interval"
    assert conclusion["best_value"] == (min if metric.minimize else max)(values)
    [row, *_] = run(
        tmp_path, "evaluate", conclusion["best_checkpoint"], "--metric", name, *more[:2], "--json"
    )
    assert row["metric"] == name
    assert row["low"] <= row["value"] <= row["high"]
    if metric.evidence is Evidence.TOKENS:
        [final] = conclusion["final_scores"][:1]
        assert row["value"] == pytest.approx(final["score"]["value"], rel=1e-4)
        assert row["low"] == pytest.approx(final["score"]["low"], rel=1e-3), "one estimator"
