"""A request becomes a command line: every flag known, every path below a folder that was given, no code."""

from __future__ import annotations

import difflib
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.service.requests import limits as allowed
from autosft.service.requests.flags import COMMANDS, CommandLine, Flag, Reach, reach_of
from autosft.service.requests.limits import Limits
from autosft.service.values import Arguments
from autosft.studies.search.settings import SETTINGS

#: A name that is a folder's, a URL's and a line's part at once.
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}")
_SETTINGS = frozenset(SETTINGS)
#: Longest text of a flag, and of a configuration.
MAX_VALUE, MAX_CONFIGURATION = 4096, 1 << 20

Given = str | int | float | bool | Sequence[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads the requests of one user."""

    owner: str
    limits: Limits
    command_line: CommandLine
    spool: Path  # where configurations are kept that a request brings
    is_taken: Callable[[str], bool]  # whether a study of this name is not the user's own
    may_use: Callable[[str], bool]  # whether a study of this name is the user's own
    defaults: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that this user's runs write below."""
        return self.limits.outputs / self.owner

    def read(
        self,
        command: str,
        given: Mapping[str, Given],
        *,
        name: str | None = None,
        configuration: str | None = None,
        key: str | None = None,
    ) -> tuple[str, Arguments]:
        """Return the item's name and its command line.

        `configuration`: the content of a best.yaml for `train`.  `key`: makes the name of a request without
        one, so that the same request has the same.  Raises UserError.
        """
        if command not in COMMANDS:
            raise UserError(f"{command[:80]!r} cannot be queued.", remedy=f"Queue {', '.join(COMMANDS)}.")
        known = self.command_line.flags(command)
        values = _by_name(command, given, known)
        if command == "train":
            values["file"] = [self._configuration(values.get("file"), configuration)]
        elif configuration is not None:
            raise UserError(f"{command} takes no configuration file.")
        name = self._name(command, values, name, key)
        flags: list[tuple[str, str]] = []
        positional: list[str] = []
        for each, texts in values.items():
            flag = known[each]
            for text in texts:
                value = self._allowed(command, flag, text)
                if not flag.spelled:
                    positional.append(value)
                elif flag.is_switch:
                    flags.append((_switch(flag, value), ""))
                else:
                    flags.append((flag.spelled, value))
        flags += self._set_by_server(command, values, name, known)
        arguments = Arguments(command=command, positional=tuple(positional), flags=tuple(flags))
        self.command_line.check(command, arguments.to_argv()[1:])
        return name, arguments

    def _allowed(self, command: str, flag: Flag, value: str) -> str:
        """Return a flag's value as it may run.  Raises UserError."""
        shown = flag.spelled or flag.name
        allowed.without_password(shown, value)
        match reach_of(command, flag, _SETTINGS):
            case Reach.NOTHING:
                if flag.name == "adapter" and "/" in value:
                    raise UserError(f"{shown} {value}: options of an adapter name no files here.")
                return value
            case Reach.SOURCE:
                return allowed.source(shown, value, self.limits) if value != "none" else value
            case Reach.SOURCES:
                return allowed.sources(shown, value, self.limits)
            case Reach.MODELS:
                return value if self.may_use(value) else allowed.source(shown, value, self.limits)
            case Reach.OUTPUT:
                return allowed.output(shown, value, self.folder)
            case Reach.STUDY | Reach.CONFIGURATION:
                return value  # checked before
            case Reach.OTHER_STUDY:
                if value in ("auto", "none") or self.may_use(value):
                    return value
                raise UserError(f"{shown} {value}: you have no study of this name.")
            case Reach.METRIC if not value.startswith("python:"):
                return value
            case Reach.METRIC | Reach.CODE | Reach.ADDRESS:
                if self.limits.allow_code or (flag.is_switch and value == "false"):
                    return value
                raise UserError(
                    f"{shown}: this server runs no code and calls no address that a request names.",
                    remedy="Leave it out, or have its admin start it with --allow-code.",
                )
            case _:
                raise UserError(f"{shown} is decided by the server.", remedy="Leave it out.")

    def _name(self, command: str, values: dict[str, list[str]], name: str | None, key: str | None) -> str:
        """Return the item's name; for a study, under its flag too.  Raises UserError."""
        given = values.get("study", [name] if name else [])
        if name and given[0] != name:
            raise UserError(f"The name {name} and --study {given[0]} differ.", remedy="Give one of them.")
        if not given:
            base = (values.get("model") or values.get("given_models") or values.get("file") or ["demo"])[0]
            stem = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(base.rstrip("/")).name).strip(".-")[:60] or command
            mark = secrets.token_hex(3) if key is None else hashlib.sha256(key.encode()).hexdigest()[:6]
            given = [f"{stem}-{mark}" if command == "tune" else f"{command}-{stem}-{mark}"]
        if not NAME.fullmatch(given[0]):
            raise UserError(
                f"{given[0][:100]!r} is not a name for the queue.",
                remedy="Use up to 100 letters, digits, dots, dashes and underscores, no dot or dash first.",
            )
        if command == "tune":
            if self.is_taken(given[0]):
                raise UserError(
                    f"There is a study {given[0]} that is not yours to go on with.",
                    remedy="Choose another name.",
                )
            values["study"] = given
        return given[0]

    def _configuration(self, paths: Sequence[str] | None, content: str | None) -> str:
        """Return the path of a checked copy of a best.yaml, given by path or by content."""
        if (paths is None) == (content is None):
            raise UserError("train takes one best.yaml: its path on the server, or its content.")
        if paths is not None:
            path = Path(allowed.source("FILE", paths[0], self.limits))
            try:
                if path.stat().st_size > MAX_CONFIGURATION:
                    raise UserError(f"FILE {paths[0]}: larger than {MAX_CONFIGURATION >> 20} MiB.")
                content = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"FILE {paths[0]} cannot be read.") from error
        assert content is not None
        if len(content) > MAX_CONFIGURATION:
            raise UserError(f"The configuration is larger than {MAX_CONFIGURATION >> 20} MiB.")
        digest = hashlib.sha256(content.encode()).hexdigest()[:32]
        copy = self.spool / f"{digest}.yaml"
        self.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = copy.with_suffix(f".{secrets.token_hex(4)}.partial")
        partial.write_text(content, encoding="utf-8")
        partial.replace(copy)
        self._require_sources(copy)
        return str(copy)

    def _require_sources(self, copy: Path) -> None:
        """Raise UserError for a configuration whose model or data may not be read."""
        from autosft.studies.export import read_config

        config = read_config(copy)
        allowed.source("model of the configuration", config.model.name, self.limits)
        options: Mapping[str, Any] = config.data.options or {}
        for said, value in (
            ("data of the configuration", config.data.source),
            ("eval_data of the configuration", options.get("eval_data")),
        ):
            if value is not None:
                allowed.sources(said, str(value), self.limits)

    def _set_by_server(
        self, command: str, values: Mapping[str, list[str]], name: str, known: Mapping[str, Flag]
    ) -> list[tuple[str, str]]:
        """Return what every run gets: where it writes."""
        chosen = {"tune": str(self.folder), "train": str(self.folder / name)}.get(command)
        added = [] if chosen is None or "output" in values else [("--output", chosen)]
        defaults = self.defaults.get(command, {})
        return added + [
            (known[each].spelled, value) for each, value in defaults.items() if each not in values
        ]


def _by_name(command: str, given: Mapping[str, Given], known: Mapping[str, Flag]) -> dict[str, list[str]]:
    """Return every given value as text, under the flag's name.  Raises UserError for what is unknown."""
    values: dict[str, list[str]] = {}
    for key, value in given.items():
        name = key.removeprefix("--").replace("-", "_")
        flag = known.get(name)
        if flag is None or (reach_of(command, flag, _SETTINGS) is None):
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"autosft {command} has no {key[:80]!r} that the service takes.",
                remedy=f"Did you mean {near[0]}?" if near else f"See autosft {command} --help.",
            )
        if value is None or name in values:
            continue
        several = isinstance(value, Sequence) and not isinstance(value, str)
        texts = [_text(name, one) for one in (value if several else [value])]  # type: ignore[union-attr]
        if several and not (flag.is_repeated or not flag.spelled):
            texts = [",".join(texts)]  # a list of choices
        values[name] = texts
    return values


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{name}: a text, a number, true or false, or a list of them.")
    text = str(value)
    if len(text) > MAX_VALUE or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise UserError(f"{name}: longer than {MAX_VALUE} characters, or with characters that do not show.")
    return text


def _switch(flag: Flag, value: str) -> str:
    if value in ("true", "false"):
        if value == "true":
            return flag.spelled
        if flag.off:
            return flag.off
    raise UserError(
        f"{flag.spelled}: {value[:80]!r}.", remedy="true or false." if flag.off else "true, or leave it out."
    )
