"""The package that is sent with a job: autosft as its wheel would install it, and the user's files.

A ZIP archive, which Ray unpacks on every node and puts on Python's path.  A wheel would not do: Ray lets pip
install it with all its requirements, which would add a second torch to the node's own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.units import gib

#: Maximum size of a request to Ray's dashboard (DASHBOARD_CLIENT_MAX_SIZE), including headers.
MAX_PACKAGE_BYTES = 99 << 20

#: Folders that are always excluded: version control, environments, caches, results.
LEFT_OUT = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        ".venv",
        "venv",
        "node_modules",
        "__pycache__",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".ipynb_checkpoints",
        "checkpoints",
    }
)

#: Files that hold passwords, keys or tokens by convention: never sent, wherever they are.
SECRETS = re.compile(
    r"\.env(\..+)?|\.netrc|_netrc|\.ssh|\.aws|\.gnupg|\.kube|\.docker|\.azure|\.gcloud|\.config|\.pgpass|\.npmrc"
    r"|\.pypirc|\.git-credentials|\.huggingface|\.ray|id_(rsa|dsa|ecdsa|ed25519)|.+\.(pem|p12|pfx|kdbx)"
)

#: Folder of the user's files in the package, so that none can shadow a module.
FILES = "files"

#: autosft's packages may be in separate folders (an editable installation) or below one (a wheel).
PACKAGES = ("profiles", "studies", "workers", "scheduler")

_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal content gives an equal archive, which Ray then has cached


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An archive that is ready to be sent."""

    path: Path
    num_files: int  # of the user's files
    left_out: tuple[str, ...]  # of the user's files, because they may hold secrets
    num_bytes: int


def pack(target: Path, folder: Path | None) -> Package:
    """Write the archive of autosft and of the files below `folder` (None: no files) to `target`.

    Raises UserError, naming the largest files, if it would be larger than Ray accepts.
    """
    files = list(files_below(folder)) if folder is not None else []
    secrets = tuple(str(path.relative_to(folder)) for path in secrets_below(folder)) if folder else ()
    refuse_large(files, folder)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, content in sorted(own_files()):
            _add(archive, name, content)
        archive.writestr(zipfile.ZipInfo(f"{FILES}/", _EPOCH), b"")
        for path in files:
            assert folder is not None
            _add(archive, f"{FILES}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return Package(path=target, num_files=len(files), left_out=secrets, num_bytes=target.stat().st_size)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder to be sent, sorted; follows links, excludes LEFT_OUT and SECRETS."""
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder} is not a folder.")
    for parent, names in _walk(folder):
        yield from (
            path for name in names if not SECRETS.fullmatch(name) and (path := Path(parent, name)).is_file()
        )


def secrets_below(folder: Path) -> Iterator[Path]:
    """Yield the files and folders that are not sent as they may hold secrets."""
    for parent, _ in _walk(folder):
        yield from (entry for entry in sorted(Path(parent).iterdir()) if SECRETS.fullmatch(entry.name))


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders below one with the names of their files; a link that leads up is not followed."""
    above: dict[str, frozenset[str]] = {str(folder): frozenset({os.path.realpath(folder)})}
    for parent, folders, names in os.walk(folder, followlinks=True):
        before = above.pop(parent)
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))  # noqa: PTH118 - as os.walk has it
            if name in LEFT_OUT or SECRETS.fullmatch(name) or real in before:
                continue
            above[os.path.join(parent, name)] = before | {real}  # noqa: PTH118
            kept.append(name)
        folders[:] = kept
        yield parent, sorted(names)


def refuse_large(files: Sequence[Path], folder: Path | None) -> None:
    """Raise UserError if files are too large to be sent, before time is spent on packing them."""
    sizes = {path: path.stat().st_size for path in files}
    if (total := sum(sizes.values())) <= MAX_PACKAGE_BYTES:
        return
    assert folder is not None
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path.relative_to(folder)} ({gib(sizes[path])})" for path in largest)
    raise UserError(
        f"--working-dir {folder} holds {gib(total)} in {len(sizes):,} files; "
        f"a job can bring {gib(MAX_PACKAGE_BYTES)}. The largest: {named}.",
        remedy="Send small files only; give models and large data as a path that all nodes can read.",
    )


def own_files() -> Iterator[tuple[str, bytes]]:
    """Yield the files of the installed autosft, with their names in its wheel."""
    for package in ("autosft", *(f"autosft.{name}" for name in PACKAGES)):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = spec.submodule_search_locations[0]
        within = package.replace(".", "/")
        for path in sorted(Path(folder).rglob("*")):
            own = path.relative_to(folder)
            is_apart = package == "autosft" and own.parts[0] in PACKAGES  # yielded under its own name
            if path.is_file() and "__pycache__" not in own.parts and not is_apart:
                yield f"{within}/{own.as_posix()}", path.read_bytes()
    installed = importlib.metadata.distribution("autosft")
    name = f"autosft-{installed.version}.dist-info"
    for file in ("METADATA", "entry_points.txt"):
        yield f"{name}/{file}", (installed.read_text(file) or "").encode()
