"""What `autosft evaluate` makes of the models that it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.cli import main
from autosft.commands.evaluate_checks import Asked, held_out_of, reader_of
from autosft.commands.evaluate_rows import words_of
from autosft.scheduler.finish.given_models import GivenModel, Kind
from autosft.studies.intervals import Interval
from autosft.studies.results.paired import PairedDifference

FOLDERS = {
    "an adapter": ("adapter_config.json", True),
    "a model": ("config.json", False),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_an_adapters_data_is_read_as_its_base_model_reads_it(case: str, tmp_path: Path) -> None:
    name, is_adapter = FOLDERS[case]
    base, folder = tmp_path / "base", tmp_path / "folder"
    for place in (base, folder):
        place.mkdir()
    (folder / name).write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert reader_of(str(folder)) == str(base if is_adapter else folder)


WORDS = [
    (0.103, 0.059, True, "lower by 0.103 ± 0.059 nats per token, better"),
    (-0.103, 0.059, True, "higher by 0.103 ± 0.059 nats per token, worse"),
    (0.01, 0.059, True, "lower by 0.01 ± 0.059 nats per token, no better or worse beyond chance"),
    (0.103, 0.059, False, "higher by 0.103 ± 0.059, better"),
]


@pytest.mark.parametrize(("value", "half", "minimize", "expected"), WORDS)
def test_a_difference_in_words(value: float, half: float, minimize: bool, expected: str) -> None:
    gain = Interval(
        value=value, standard_error=half / 2, low=value - half, high=value + half, num_examples=50
    )
    made = PairedDifference(metric="m", gain=gain, is_loss=minimize, minimize=minimize)
    assert words_of(made) == expected


def test_a_model_of_no_study_has_no_held_out_data() -> None:
    assert held_out_of(GivenModel(given="x/y", kind=Kind.HUB, source="x/y")) is None


@pytest.mark.parametrize(("metrics", "wants"), [(("ifeval",), False), (("hellaswag", "eval_loss"), True)])
def test_only_metrics_of_tokens_need_data(metrics: tuple[str, ...], wants: bool) -> None:
    asked = Asked(
        metrics=metrics,
        data=None,
        seq_len=None,
        ifeval_data="google/IFEval",
        ifeval_new_tokens=10,
        limit=None,
        batch_size=1,
        task_folder=None,
        template_date=None,
        race=False,
        trust_remote_code=False,
    )
    assert asked.wants_tokens is wants


def test_an_untuned_model_alone_needs_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert main(["evaluate", "someone/model", "--metric", "eval_loss"]) == 2
    err = capsys.readouterr().err
    assert "someone/model belongs to no study" in err
    assert "--data" in err
