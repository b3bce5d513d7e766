"""A user's own trainer or loss function, named as `package.module:name`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.errors import MissingExtraError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """A class or function of the user's, and what its module contained when the study began."""

    name: str  # "package.module:attribute"
    fingerprint: str  # sha256 of the module's source


def find(name: str, *, flag: str) -> UserCode:
    """Look for `name` in the current folder and among what is installed.  Raises UserError."""
    return UserCode(name=name, fingerprint=fingerprint(_module(name, flag=flag), _load(name, flag=flag)))


def load(code: UserCode, *, flag: str) -> Any:
    """Import what `code` names.  Raises UserError when it is not there or has changed meanwhile."""
    found = _load(code.name, flag=flag)
    now = fingerprint(_module(code.name, flag=flag), found)
    if now != code.fingerprint:
        raise UserError(
            f"{flag} {code.name} has changed since the study began "
            f"(sha256 {now[:12]}…, expected {code.fingerprint[:12]}…).",
            remedy="Trials would not be comparable: start a new study with --study NAME.",
        )
    return found


def fingerprint(module: Any, found: Any) -> str:
    """Return the sha256 of a module's source; of a compiled one its name and version stand in."""
    try:
        text = Path(inspect.getsourcefile(module) or "").read_bytes()
    except (OSError, TypeError):
        text = f"{module.__name__} {getattr(module, '__version__', '')} {found!r}".encode()
    return hashlib.sha256(text).hexdigest()


def _module(name: str, *, flag: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(
            f"{flag} {name} does not name a module and what is in it.",
            remedy=f"Write {flag} package.module:name.",
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a console script has its own folder there instead
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if missing := missing_extra(error, f"{flag} {name}"):
            raise missing from error
        if error.name is not None and module_name.startswith(error.name):
            raise UserError(
                f"{flag} {name}: there is no module {error.name} in {here} or installed.",
                remedy="Start autosft in the folder that holds it, or install it.",
            ) from None
        raise UserError(f"{flag} {name}: importing it failed: {error}.", remedy="Install it.") from error
    except Exception as error:
        raise UserError(
            f"{flag} {name}: importing it failed: {type(error).__name__}: {error}",
            remedy=f"Try: python -c 'import {module_name}'",
        ) from error


def missing_extra(error: BaseException, what: str) -> MissingExtraError | None:
    """Return the optional part of autosft whose absence `error` says, None where it says something else."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = {"liger_kernel": "gpu", "triton": "gpu", "bitsandbytes": "gpu"}.get(module)
    return None if extra is None else MissingExtraError(what=f"{what}, which imports {module},", extra=extra)


def _load(name: str, *, flag: str) -> Any:
    module = _module(name, flag=flag)
    attribute = name.partition(":")[2]
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"{flag} {name}: {module.__name__} has no class or function {attribute}.",
            remedy="Check the name.",
        )
    return found
