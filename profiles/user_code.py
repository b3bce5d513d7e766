"""A user's own trainer, loss or metric, named as `package.module:name`.

It is looked for in the current folder, and where it was found then when a study is gone on with elsewhere.
That folder stands last on Python's path: another file in it, a `queue.py` say, takes no module's place.
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
    """A class or function of the user's, and what its module contained when the study began."""

    name: str  # "package.module:attribute"
    fingerprint: str  # sha256 of the module's source
    folder: str = ""  # in which the module was found; "" for one that is installed, and of earlier versions


def find(name: str, *, flag: str) -> UserCode:
    """Look for `name` in the current folder and among what is installed.  Raises UserError."""
    here = Path.cwd()
    module, found = _load(name, here, flag=flag)
    folder = str(here) if _lies_in(here, name.partition(":")[0]) else ""
    return UserCode(name=name, fingerprint=fingerprint(module, found), folder=folder)


def load(code: UserCode, *, flag: str) -> Any:
    """Import what `code` names.  Raises UserError when it is not there or has changed meanwhile."""
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
    """Return the sha256 of a module's source; of a compiled one its name and version stand in."""
    try:
        text = Path(inspect.getsourcefile(module) or "").read_bytes()
    except (OSError, TypeError):
        text = f"{module.__name__} {getattr(module, '__version__', '')} {found!r}".encode()
    return hashlib.sha256(text).hexdigest()


def import_user_module(module_name: str, folder: Path, *, what: str) -> Any:
    """Import a module of the user's from `folder`, or an installed one; `what` asked for it.

    Raises UserError where there is none, and where the folder's has the name of another module.
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
    """Whether a module's file or package lies in a folder."""
    path = folder.joinpath(*module_name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _is_from(folder: Path, top: str) -> bool:
    """Whether importing `top` gives what lies in a folder."""
    if top in sys.stdlib_module_names:
        return False
    known = sys.modules.get(top)
    spec = find_spec(top) if known is None else getattr(known, "__spec__", None)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(place and Path(place).resolve().is_relative_to(folder.resolve()) for place in places)


def missing_extra(error: BaseException, what: str) -> MissingExtraError | None:
    """Return the optional part of autosft whose absence `error` says, None where it says something else."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = {"liger_kernel": "gpu", "triton": "gpu", "bitsandbytes": "gpu"}.get(module)
    return None if extra is None else MissingExtraError(what=f"{what}, which imports {module},", extra=extra)


def _load(name: str, folder: Path, *, flag: str) -> tuple[Any, Any]:
    """Return the module that `name` names and what is in it.  Raises UserError."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(
            f"{flag} {name} does not name a module and what is in it.",
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
