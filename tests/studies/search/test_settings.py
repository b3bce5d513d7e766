"""One row a searched setting: what a further row makes without another line, down to the training step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from autosft.commands.flags import as_request_fields, with_request_flags, with_setting_flags
from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method
from autosft.studies.formatting import format_settings
from autosft.studies.request import read_request
from autosft.studies.search.dimensions import Fixed, Range
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.sampling import propose
from autosft.studies.search.settings import SETTINGS, Kind, Setting
from autosft.studies.search.space import (
    FixedSettings,
    SearchSpace,
    complete,
    default_parameters,
    default_space,
    settings_from,
)
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.training.sft_config import sft_config_fields
from tests.workers.small import job, make_data

#: Until now the same in every trial: a field of TrainingSettings that `workers.sft_config` applies.
BETA2 = Setting(
    name="adam_beta2",
    help="Decay of AdamW's second moment.",
    low=0.5,
    high=0.99999,
    example="0.95..0.999",
    short="beta2 ",
    noun="beta2",
    default=Fixed(value=0.999),
    absent=Fixed(value=0.999),
)


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setitem(SETTINGS, BETA2.name, BETA2)
    return BETA2


def made(given: dict[str, object]) -> SearchSpace:
    return default_space(
        method=Method.FULL,
        num_parameters=135_000_000,
        num_train_examples=10_000,
        seq_lens=[12],
        effective_batch_sizes=[8],
        overrides={name: parse_dimension(name, value) for name, value in given.items()},
    )


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_row_reads_its_own_example(setting: Setting) -> None:
    given = setting.example if setting.kind is not Kind.TEXT else setting.example.strip("[]").split(", ")
    found = parse_dimension(setting.name, given)
    assert not isinstance(found, Fixed)
    assert parse_dimension(setting.name, found.start()) == Fixed(value=found.start())
    assert setting.help.endswith((".", "…"))
    if setting.kind is not Kind.TEXT and setting.low is not None:
        with pytest.raises(UserError, match="out of bounds"):
            parse_dimension(setting.name, setting.low - 1)


def test_another_row_goes_from_the_flag_to_the_trainer(one_more: Setting, tmp_path: Path) -> None:
    # The command line and YAML
    for wrap in (with_request_flags, with_setting_flags):

        def command(**given: object) -> None:
            """Do nothing."""

        app = typer.Typer()
        app.command()(wrap(command))
        helps = {option: getattr(p, "help", "") for p in get_command(app).params for option in p.opts}
        assert helps["--adam-beta2"] == one_more.help
    file = tmp_path / "study.yaml"
    file.write_text("adam_beta2: 0.95..0.999\n")
    for request in (
        read_request({}, file),
        read_request(as_request_fields({"adam_beta2": "0.95..0.999"}), None),
    ):
        assert request.dimensions() == {"adam_beta2": Range(low=0.95, high=0.999)}
    # The space, the sampler and the settings of a trial
    space = made(request.space)
    assert list(space.searched())[-1] == "adam_beta2"
    assert default_parameters(space)["adam_beta2"] == 0.999
    proposed = propose(space, [], maximize=False, num_trials=10, seed=0)
    assert 0.95 <= float(proposed["adam_beta2"]) <= 0.999
    settings = settings_from(
        space, {**default_parameters(space), "adam_beta2": 0.96}, FixedSettings(num_train_examples=64)
    )
    assert settings.adam_beta2 == 0.96
    # The training step
    made_job = job(tmp_path / "model", make_data(tmp_path / "data"), tmp_path, settings=replace(settings))
    assert sft_config_fields(made_job, num_steps=8, staging_dir="staging")["adam_beta2"] == 0.96
    # What is shown and kept
    shown = format_settings([("learning_rate", 1e-4), ("adam_beta2", 0.96)], default_parameters(space))
    assert shown == "lr 1e-4 beta2 0.96"
    assert from_plain(SearchSpace, to_plain(space)) == space
    with pytest.raises(UserError, match=r"from 0.5 to 0.99999"):
        parse_dimension("adam_beta2", 1.5)


def test_a_study_from_before_a_row_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    before = made({})
    plain = to_plain(before)
    monkeypatch.setitem(SETTINGS, BETA2.name, BETA2)
    after = from_plain(SearchSpace, plain)
    assert after == made({}), "the same study, which is gone on with"
    assert complete(after, default_parameters(before)) == default_parameters(before)
    fixed = FixedSettings(num_train_examples=64)
    assert settings_from(after, default_parameters(after), fixed).adam_beta2 == 0.999
