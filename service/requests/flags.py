"""Which flags of a command a request may give, and what each of them can name.

The flags themselves come from the command line, handed in by whoever starts the server (`CommandLine`).  Here
stands only what a flag that takes text can reach: a file, a study, code.  A flag that takes text and is not
listed is refused, so that a new one cannot reach anything before somebody has thought of it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

#: What the service runs.
COMMANDS = ("tune", "train", "evaluate")


class Reach(enum.Enum):
    """What the text of a flag can name."""

    NOTHING = "nothing"  #: a number, a choice, a setting: nothing outside of the request
    SOURCE = "source"  #: a file, a folder or a hub id that is read
    SOURCES = "sources"  #: several of them, `a.jsonl:2,b.csv`
    MODELS = "models"  #: a study, or a source
    CONFIGURATION = "configuration"  #: a best.yaml, whose sources are checked and which is copied
    OUTPUT = "output"  #: a folder that is written
    STUDY = "study"  #: the name of the item's own study
    OTHER_STUDY = "other study"  #: the name of another study of the same owner
    METRIC = "metric"  #: a metric; `python:` is code
    ADDRESS = "address"  #: a URL that is called, or a command that is run
    CODE = "code"  #: code that runs on the server
    SERVER = "server"  #: what the server decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag or argument of a command."""

    name: str  # as in a request: learning_rate
    spelled: str  # --learning-rate; "" for an argument
    off: str = ""  # --no-prune, where there is one
    is_switch: bool = False
    is_repeated: bool = False
    is_text: bool = True  # neither a number nor one of a few words
    is_required: bool = False
    help: str = ""


class CommandLine(Protocol):
    """The command line, for those below it."""

    def flags(self, command: str) -> Mapping[str, Flag]:
        """Return the flags of a command by name."""
        ...

    def check(self, command: str, arguments: Sequence[str]) -> None:
        """Raise UserError for what the command would refuse without reading a file."""
        ...


_OF_TUNE = {
    "model": Reach.SOURCE,
    "data": Reach.SOURCES,
    "eval_data": Reach.SOURCES,
    "ifeval_data": Reach.SOURCE,
    "output": Reach.OUTPUT,
    "study": Reach.STUDY,
    "warm_start": Reach.OTHER_STUDY,
    "loss": Reach.CODE,
    "trainer": Reach.CODE,
    "trust_remote_code": Reach.CODE,
    "notify": Reach.ADDRESS,
    "report_to": Reach.ADDRESS,
    "config": Reach.SERVER,  # a client sends what is in it
    "hardware": Reach.SERVER,
    "gpus": Reach.SERVER,
    "address": Reach.SERVER,
    "storage": Reach.SERVER,
    "dry_run": Reach.SERVER,
    "take_offer": Reach.NOTHING,
    "as_json": Reach.SERVER,
    "quiet": Reach.SERVER,
    **dict.fromkeys(
        ("preset", "time_budget", "disk_budget", "metric", "target", "final_metric", "adapter"), Reach.NOTHING
    ),
    "template_date": Reach.NOTHING,
    "fold": Reach.NOTHING,
}
_OF_TRAIN = {
    "file": Reach.CONFIGURATION,
    "model": Reach.SOURCE,
    "data": Reach.SOURCES,
    "eval_data": Reach.SOURCES,
    "ifeval_data": Reach.SOURCE,
    "output": Reach.OUTPUT,
    "trust_remote_code": Reach.CODE,
    **dict.fromkeys(("hardware", "gpus", "storage", "dry_run", "as_json", "quiet"), Reach.SERVER),
}
_OF_EVALUATE = {
    "given_models": Reach.MODELS,
    "metric": Reach.METRIC,
    "data": Reach.SOURCES,
    "ifeval_data": Reach.SOURCE,
    "task_folder": Reach.CODE,  # lm-eval runs functions that its tasks name
    "trust_remote_code": Reach.CODE,
    "template_date": Reach.NOTHING,
    **dict.fromkeys(("storage", "as_json", "quiet"), Reach.SERVER),
}
REACHES: Mapping[str, Mapping[str, Reach]] = {
    "tune": _OF_TUNE,
    "train": _OF_TRAIN,
    "evaluate": _OF_EVALUATE,
}


def reach_of(command: str, flag: Flag, settings: frozenset[str]) -> Reach | None:
    """Return what a flag can name; None for one that takes text and that nobody has judged.

    `settings`: names of searched settings, whose text is a value, a list or a range.
    """
    known = REACHES[command].get(flag.name)
    if known is not None:
        return known
    return Reach.NOTHING if not flag.is_text or flag.name in settings else None
