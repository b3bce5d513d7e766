"""best.yaml: what is written is what is read, and anything else is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.export import ExportedConfig, PromptSource, exported, read_config, write_config
from autosft.studies.export.config import prompts_of
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from tests.studies.study_examples import PLAN, end, evaluation, opened, start
from tests.studies.study_examples import spec as study_spec


@pytest.fixture
def config(sqlite_url: str) -> ExportedConfig:
    records = open_records(sqlite_url)
    study = opened(records, name='it\'s "a" study: 🦙', data_options={"block_size": None, "max_rounds": 3})
    study.ask(now=0.0)
    start(study, 0)
    for number, loss in enumerate((1.3, 1.1, 1.2), start=1):
        study.record(evaluation(0, 1, number, loss), now=1.0)
    study.end_attempt(end(0, 1), TrialState.COMPLETED, now=2.0)
    records.close()
    return exported(study.spec, study.trial(0))


def test_it_comes_back_as_it_was(config: ExportedConfig, tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    for _ in range(2):  # and may be written over
        write_config(path, config)
    assert read_config(path) == config
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".db"] == ["best.yaml"]
    assert (config.expected.value, config.expected.step, config.expected.final_value) == (1.1, 20, 1.2)
    assert config.plan == PLAN
    text = path.read_text()
    assert "autosft train best.yaml" in text
    assert f"learning_rate: {config.settings.learning_rate!r}" in text


BROKEN = {
    "not YAML": (lambda text: text + "\n}: x", "is not YAML"),
    "something else": (lambda _: "- a\n- b\n", "is not a configuration that autosft has exported"),
    "empty": (lambda _: "", "is not a configuration"),
    "newer": (
        lambda text: text.replace("format: 1", "format: 2"),
        "has format 2; this version of autosft reads format 1",
    ),
    "a wrong value": (
        lambda text: text.replace("effective_batch_size: ", "effective_batch_size: many #"),
        "settings.effective_batch_size: 'many' is not int",
    ),
    "an unknown key": (lambda text: text.replace("  tf32: false", "  tf33: false"), "tf33"),
    "a missing key": (
        lambda text: text.replace("  tf32: false\n", ""),
        "pinned: the field 'tf32' is missing",
    ),
    "an unknown method": (lambda text: text.replace("method: full", "method: fool"), "'fool' is none of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_anything_else_is_refused_with_its_path(case: str, config: ExportedConfig, tmp_path: Path) -> None:
    damage, said = BROKEN[case]
    path = tmp_path / "best.yaml"
    write_config(path, config)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError) as raised:
        read_config(path)
    assert said in str(raised.value)
    assert "best.yaml" in str(raised.value)


def test_a_place_that_cannot_be_read_or_written_is_explained(config: ExportedConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_config(tmp_path / "no" / "folder.yaml", config)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(binary)


def test_the_prompts_of_a_study_are_named_with_what_was_left_at_its_default(config: ExportedConfig) -> None:
    assert config.prompts is None
    spec = study_spec(
        metric="ifeval", environment={"goal": {"metric": "ifeval", "ifeval_data": "asked.json"}}
    )
    assert prompts_of(spec) == PromptSource(source="asked.json", max_new_tokens=1280, seed=0)
    assert prompts_of(study_spec(metric="ifeval")).source == "google/IFEval"
