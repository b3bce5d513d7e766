"""What a request may name, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autosft.commands.service_flags import TyperCommandLine
from autosft.profiles.errors import UserError
from autosft.service.requests.flags import COMMANDS, REACHES, Reach, reach_of
from autosft.service.requests.limits import Limits
from autosft.service.requests.read import Reader
from autosft.studies.search.settings import SETTINGS

LINE = TyperCommandLine()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folders: `data` may be read, `outputs` written, `secret` neither."""
    for name in ("data/llama", "data/sub", "outputs", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "data/b.csv", "data/sub/c.jsonl", "secret/s.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "inside").symlink_to(tmp_path / "data" / "sub")
    leaky = tmp_path / "data" / "leaky"
    leaky.mkdir()
    (leaky / "train.jsonl").symlink_to(tmp_path / "secret" / "s.jsonl")
    adapter = tmp_path / "data" / "adapter"
    adapter.mkdir()
    base = {"base_model_name_or_path": str(tmp_path / "secret")}
    (adapter / "adapter_config.json").write_text(json.dumps(base))
    return tmp_path


def reader(place: Path, **limits: Any) -> Reader:
    return Reader(
        owner="ada",
        limits=Limits(folders=(place / "data",), outputs=place / "outputs", **limits),
        command_line=LINE,
        spool=place / "spool",
        is_taken=lambda name: name == "bobs",
        may_use=lambda name: name == "mine",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_been_judged(command: str) -> None:
    flags = LINE.flags(command)
    unjudged = [n for n, flag in flags.items() if reach_of(command, flag, frozenset(SETTINGS)) is None]
    assert unjudged == ["server"]  # a server asks no other server
    assert [name for name in REACHES[command] if name not in flags] == []


SOURCES = {
    "a file in the folder": ("a.jsonl", "data/a.jsonl"),
    "in full": ("{}/data/a.jsonl", "{}/data/a.jsonl"),
    "below the folder": ("sub/c.jsonl", "data/sub/c.jsonl"),
    "through a link inside": ("inside/c.jsonl", "data/sub/c.jsonl"),
    "of the hub": ("tatsu-lab/alpaca", "tatsu-lab/alpaca"),
    "several with weights": ("a.jsonl:2,{}/data/b.csv", "data/a.jsonl:2,data/b.csv"),
    "dots that stay inside": ("{}/data/sub/../a.jsonl", "data/a.jsonl"),
    "outside": ("{}/secret/s.jsonl", None),
    "up and out": ("{}/data/../secret/s.jsonl", None),
    "relative and out": ("../secret/s.jsonl", None),
    "through a link out": ("out/s.jsonl", None),
    "a folder with a link out": ("leaky", None),
    "one of several outside": ("a.jsonl,{}/secret/s.jsonl", None),
    "the root": ("/", None),
    "somebody's home": ("~/chats.jsonl", None),
    "not there": ("{}/data/none.jsonl", None),
    "a URL": ("https://evil.example/a.jsonl", None),
    "a bucket": ("s3://bucket/a.jsonl", None),
    "a file URL": ("file:///etc/passwd", None),
    "nothing": ("", None),
    "only commas": (",,", None),
    "a line break": ("a.jsonl\n--trainer=x", None),
    "a null": ("a.jsonl\0", None),
    "a password": ("https://ada:secret@host/a.jsonl", None),
    "very long": ("a" * 5000, None),
}


@pytest.mark.parametrize("case", SOURCES)
def test_data_is_read_below_the_folders_alone(place: Path, case: str) -> None:
    given, expected = SOURCES[case]
    request = {"model": "llama", "data": given.replace("{}", str(place))}
    if expected is None:
        with pytest.raises(UserError) as refusal:
            reader(place).read("tune", request)
        assert "secret@" not in str(refusal.value)
        return
    _, arguments = reader(place).read("tune", request)
    wanted = ",".join(
        part if part.startswith("tatsu") else str(place / part.replace("{}/", ""))
        for part in expected.split(",")
    )
    assert dict(arguments.flags)["--data"] == wanted


REFUSED = {
    "code: a trainer": ("tune", {"trainer": "mine:Trainer"}),
    "code: a loss": ("tune", {"loss": "mine:loss"}),
    "code that comes with a model": ("tune", {"trust_remote_code": True}),
    "an address": ("tune", {"notify": "https://evil.example"}),
    "a command": ("tune", {"notify": "rm -rf /"}),
    "a metric that is code": ("evaluate", {"given_models": ["llama"], "metric": ["python:os.getcwd"]}),
    "tasks with code": ("evaluate", {"given_models": ["llama"], "metric": ["x"], "task_folder": "sub"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_code_runs_only_where_the_admin_allows_it(place: Path, case: str) -> None:
    command, request = REFUSED[case]
    with pytest.raises(UserError, match="--allow-code"):
        reader(place).read(command, request)
    _, arguments = reader(place, allow_code=True).read(command, request)
    assert arguments.command == command


WRONG = {
    "the server's devices": ("tune", {"hardware": "cpu"}, "decided by the server"),
    "the server's database": ("tune", {"storage": "sqlite:////tmp/x.db"}, "decided by the server"),
    "a file with flags": ("tune", {"config": "/etc/x.yaml"}, "decided by the server"),
    "an unknown flag": ("tune", {"learning_rat": 1}, "learning_rat"),
    "an option in a name": ("tune", {"model --trainer": "x"}, "no "),
    "a value out of bounds": ("tune", {"trials": 0}, "trials"),
    "no number": ("tune", {"trials": "many"}, "trials"),
    "a range that is none": ("tune", {"learning_rate": "1e-3..1e-5"}, "learning"),
    "model without data": ("tune", {"model": "llama"}, "--data is missing"),
    "a study of somebody else": ("tune", {"study": "bobs"}, "not yours"),
    "a name that is a path": ("tune", {"study": "../bob"}, "not a name"),
    "to start from another's": ("tune", {"warm_start": "bobs"}, "no study of this name"),
    "to write elsewhere": ("tune", {"output": "/etc"}, "write below"),
    "to write up": ("tune", {"output": "../bob"}, "write below"),
    "to write to a bucket": ("tune", {"output": "s3://bucket"}, "write below"),
    "an adapter whose base is elsewhere": ("tune", {"model": "adapter", "data": "a.jsonl"}, "base model"),
    "a switch with a word": ("tune", {"prune": "maybe"}, "true or false"),
    "an object": ("tune", {"trials": {"a": 1}}, "a text, a number"),
    "another command": ("dashboard", {}, "cannot be queued"),
    "a model that is no model's place": ("evaluate", {"given_models": ["/etc"], "metric": ["x"]}, "/etc"),
    "train without a file": ("train", {}, "best.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_in_words(place: Path, case: str) -> None:
    command, request, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        reader(place).read(command, request)


def test_a_request_becomes_the_command_that_one_would_type(place: Path) -> None:
    request = {
        "model": "llama",
        "data": "a.jsonl",
        "learning-rate": "1e-5..1e-3 log",
        "lora_rank": [8, 16],
        "--method": "lora",
        "prune": False,
        "skip_bad_records": True,
        "trials": 24.0,
    }
    name, arguments = reader(place).read("tune", request, name="night-1")
    assert name == "night-1"
    assert arguments.to_argv() == (
        "tune",
        f"--model={place}/data/llama",
        f"--data={place}/data/a.jsonl",
        "--learning-rate=1e-5..1e-3 log",
        "--lora-rank=8,16",
        "--method=lora",
        "--no-prune",
        "--skip-bad-records",
        "--trials=24",
        "--study=night-1",
        f"--output={place}/outputs/ada",
    )


def test_a_value_never_becomes_a_flag(place: Path) -> None:
    _, arguments = reader(place).read("evaluate", {"given_models": ["mine", "llama"], "metric": ["--again"]})
    assert "--metric=--again" in arguments.to_argv()
    assert arguments.to_argv()[-3:] == ("--", "mine", f"{place}/data/llama")


def test_a_configuration_is_copied_and_its_sources_checked(place: Path) -> None:
    from autosft.studies.export import as_yaml
    from tests.service.api.studies import example_config

    inside = example_config(place / "one", model=str(place / "data/llama"), data=str(place / "data/a.jsonl"))
    _, arguments = reader(place).read("train", {}, configuration=as_yaml(inside), name="again")
    copy = Path(arguments.positional[0])
    assert copy.parent == place / "spool"
    assert copy.read_text() == as_yaml(inside)
    assert dict(arguments.flags)["--output"] == f"{place}/outputs/ada/again"
    outside = example_config(place / "two", model=str(place / "secret"), data=str(place / "data/a.jsonl"))
    with pytest.raises(UserError, match="model of the configuration"):
        reader(place).read("train", {}, configuration=as_yaml(outside))


def test_the_reach_of_code_is_known_by_its_own_name() -> None:
    assert REACHES["tune"]["trainer"] is Reach.CODE
