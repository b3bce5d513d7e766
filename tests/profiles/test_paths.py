"""A path keeps its meaning from any folder, and what has moved or changed is said to have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.sources import files_mark, full_path, mark_in, require_base, require_base_of_adapter
from autosft.scheduler.setup.inputs import with_full_paths
from autosft.studies.request import TuneRequest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data in it, which is the current one."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"0" * 100)
    for name in ("chats.jsonl", "held_out.jsonl", "prompts.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = [
    # as typed, kept; {} is the folder
    ("llama", "{}/llama"),
    ("./llama/", "{}/llama"),
    ("chats.jsonl", "{}/chats.jsonl"),
    ("../{name}/llama", "{}/llama"),
    ("{}/llama", "{}/llama"),
    ("gpt2", "gpt2"),
    ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ("none", "none"),
]


@pytest.mark.parametrize(("given", "kept"), GIVEN)
def test_what_lies_here_is_kept_in_full(given: str, kept: str, folder: Path) -> None:
    assert full_path(given.format(folder, name=folder.name)) == kept.format(folder)


def test_home_is_written_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert full_path("~/llama") == str(folder / "llama")


def test_a_request_is_kept_with_full_paths(folder: Path) -> None:
    asked = TuneRequest(
        model="llama",
        data="chats.jsonl",
        eval_data="held_out.jsonl",
        metric="ifeval",
        ifeval_data="prompts.json",
    )
    kept = with_full_paths(asked)
    assert (kept.model, kept.data, kept.eval_data, kept.ifeval_data) == tuple(
        str(folder / name) for name in ("llama", "chats.jsonl", "held_out.jsonl", "prompts.json")
    )
    assert "model" in kept.model_fields_set


def test_a_base_that_has_moved_or_changed_is_refused(folder: Path) -> None:
    source = str(folder / "llama")
    mark = files_mark(source)
    assert require_base(source, mark, of="study 'x'") == source
    assert require_base("owner/name", mark, of="study 'x'") == "owner/name"
    weights = folder / "llama" / "model.safetensors"
    weights.write_bytes(b"0" * 101)
    with pytest.raises(UserError, match="is not the model that study 'x'"):
        require_base(source, mark, of="study 'x'")
    assert require_base(source, None, of="study 'x'") == source, "of earlier versions"
    (folder / "llama").rename(folder / "moved")
    with pytest.raises(UserError, match=r"was in .*llama, which no longer exists"):
        require_base(source, mark, of="study 'x'")


def test_an_adapter_names_a_base_that_is_there(folder: Path) -> None:
    adapter = folder / "adapter"
    adapter.mkdir()
    require_base_of_adapter(adapter)
    for base, is_gone in ((str(folder / "llama"), False), ("owner/name", False), ("/no/such/llama", True)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        if is_gone:
            with pytest.raises(UserError, match="/no/such/llama, which no longer exists"):
                require_base_of_adapter(adapter)
        else:
            require_base_of_adapter(adapter)


def test_environments_of_earlier_versions_have_no_mark() -> None:
    assert mark_in({"model": {"files": "abc"}}) == "abc"
    for environment in (None, {}, {"model": {"architecture": "x"}}, "text"):
        assert mark_in(environment) is None
