"""Load a user's trainer, loss or metric, given as `package.module:name`.

It is looked for in the current folder; a study that is resumed elsewhere looks where it was found first.
That folder comes last on Python's path, so that no other file in it, such as a `queue.py`, shadows a module.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autosft.profiles.errors import MissingExtraError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """A user's class or function, with the fingerprint of its module when the study began."""

    name: str  # "package.module:attribute"
    fingerprint: str  # sha256 of the module's source
    folder: str = ""  # where the module was found; "" for installed ones, and in records of earlier versions


def find(name: str, *, flag: str) -> UserCode:
    """Find `name` in the current folder or among installed packages.  Raises UserError if there is none."""
    here = Path.cwd()
    module, found = _load(name, here, flag=flag)
    folder = str(here) if _lies_in(here, name.partition(":")[0]) else ""
    return UserCode(name=name, fingerprint=fingerprint(module, found), folder=folder)


def load(code: UserCode, *, flag: str) -> Any:
    """Import what `code` names.  Raises UserError if it does not exist or has changed since."""
    module, found = _load(code.name, Path(code.folder or Path.cwd()), flag=flag)
    now = fingerprint(module, found)
    if now != code.fingerprint:
        raise UserError(
            f"{flag} {code.name} has changed since the study began "
            f"(sha256 {now[:12]}…, expected {code.fingerprint[:12]}…).",
            remedy="Trials would not be comparable: start a new study with --study NAME.",
        )
    return found


def fingerprint(module: Any, found: Any) -> str:
    """Return the sha256 of a module's source, or of its name and version if it is compiled."""
    try:
        text = Path(inspect.getsourcefile(module) or "").read_bytes()
    except (OSError, TypeError):
        text = f"{module.__name__} {getattr(module, '__version__', '')} {found!r}".encode()
    return hashlib.sha256(text).hexdigest()


def import_user_module(module_name: str, folder: Path, *, what: str) -> Any:
    """Import a user's module from `folder`, or an installed one; `what` names the option for messages.

    Raises UserError if it does not exist, or if another module of the same name shadows it.
    """
    top = module_name.partition(".")[0]
    is_here = _lies_in(folder, module_name)
    if is_here and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    if is_here and not _is_from(folder, top):
        raise UserError(
            f"{what}: {folder / top} has the name of another module, which Python finds first.",
            remedy="Give your file another name.",
        )
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if missing := missing_extra(error, what):
            raise missing from error
        if error.name is not None and module_name.startswith(error.name):
            raise UserError(
                f"{what}: there is no module {error.name} in {folder} or installed.",
                remedy="Start autosft in the folder that holds it, or install it.",
            ) from None
        raise UserError(f"{what}: importing it failed: {error}.", remedy="Install it.") from error
    except Exception as error:
        raise UserError(
            f"{what}: importing it failed: {type(error).__name__}: {error}",
            remedy=f"Try: python -c 'import {module_name}'",
        ) from error


def _lies_in(folder: Path, module_name: str) -> bool:
    """Return whether a module's file or package is in a folder."""
    path = folder.joinpath(*module_name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _is_from(folder: Path, top: str) -> bool:
    """Return whether importing `top` gives the module in a folder."""
    if top in sys.stdlib_module_names:
        return False
    known = sys.modules.get(top)
    spec = find_spec(top) if known is None else getattr(known, "__spec__", None)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(place and Path(place).resolve().is_relative_to(folder.resolve()) for place in places)


def missing_extra(error: BaseException, what: str) -> MissingExtraError | None:
    """Return the error for the optional part whose absence caused `error`, None for other causes."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = {"liger_kernel": "gpu", "triton": "gpu", "bitsandbytes": "gpu"}.get(module)
    return None if extra is None else MissingExtraError(what=f"{what}, which imports {module},", extra=extra)


def _load(name: str, folder: Path, *, flag: str) -> tuple[Any, Any]:
    """Return the module and the attribute that `name` refers to.  Raises UserError."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(
            f"{flag} {name} is not of the form package.module:name.",
            remedy=f"Write {flag} package.module:name.",
        )
    module = import_user_module(module_name, folder, what=f"{flag} {name}")
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"{flag} {name}: {module.__name__} has no class or function {attribute}.",
            remedy="Check the name.",
        )
    return module, found
