"""best.yaml: what is written is what is read, and anything else is refused with its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.user_code import UserCode
from autosft.scheduler.train.config_inputs import require_trust
from autosft.studies.export import ExportedConfig, PromptSource, exported, read_config, write_config
from autosft.studies.export.config import prompts_of
from autosft.studies.export.tools import Run
from autosft.studies.export.writing import as_yaml, bash, powershell
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


NAMES = {
    "a line end": "demo\nimport os  # not a comment",
    "a return": "demo\r\nrm x",
    "a separator": "demo\u2028x\u0085y\x0bz",
    "control characters": "demo\x1b[2J\x00",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_foreign_database_holds_never_becomes_a_line_of_a_script(
    config: ExportedConfig, name: str
) -> None:
    """Names of studies, metrics, models, devices and packages stand behind a comment's mark."""
    text = NAMES[name]
    run = Run(
        config=dataclasses.replace(
            config,
            study=text,
            model=dataclasses.replace(config.model, name=text, fingerprint=text),
            data=dataclasses.replace(config.data, source=text),
            expected=dataclasses.replace(config.expected, metric=text),
            environment={"packages": {text: text}},
        ),
        plan=dataclasses.replace(PLAN, device_name=text),
        num_steps=4,
        on_cpu=True,
        own_template=False,
    )
    for written in (bash("true", run), powershell("true", run), as_yaml({}, run)):
        assert not any(ord(letter) < 32 and letter != "\n" for letter in written)
        for line in written.splitlines():
            assert "demo" not in line or line.startswith("# ")
            assert not line.startswith(("import", "rm", "x", "y", "z"))


def test_a_file_that_names_code_is_trained_only_where_the_user_trusts_it(config: ExportedConfig) -> None:
    """Nothing of it is imported before that."""
    code = UserCode(name="losses:focal", fingerprint="0" * 64, folder="/home/somebody")
    path = Path("best.yaml")
    require_trust(config, path, trust_remote_code=False)
    for named in ({"loss": code}, {"trainer": code}):
        foreign = dataclasses.replace(config, pinned=dataclasses.replace(config.pinned, **named))
        with pytest.raises(UserError, match=r"losses:focal from /home/somebody.*would run") as raised:
            require_trust(foreign, path, trust_remote_code=False)
        assert "--trust-remote-code" in str(raised.value)
        require_trust(foreign, path, trust_remote_code=True)
