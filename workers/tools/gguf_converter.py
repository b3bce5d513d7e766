"""Find, install and call llama.cpp's converters from folders of models and of adapters to GGUF files.

`python -m autosft.workers.tools.gguf_converter` installs it: pip downloads llama-cpp-python's source package,
pinned by its hash, of which only the converter is kept (2 MB of Python, nothing is built).  It is stored next
to the environment's packages, since wheels that include it would replace the package `gguf`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError

VERSION = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
MODELS, ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_KEPT = ("conversion/", "gguf-py/gguf/", MODELS, ADAPTERS, "LICENSE")
#: Packages of the extra `gguf` that it requires.
_NEEDED = ("sentencepiece", "google.protobuf")

GET_IT = shlex.join(python("-m", "autosft.workers.tools.gguf_converter"))
GET_PACKAGES = "pip install 'autosft[gguf]'"

#: The values of `--dtype` for a GGUF file: the converter's own types.
DTYPES = ("f32", "f16", "bf16", "q8_0")


def home(script: str = MODELS) -> Path | None:
    """Return the folder with a converter, `MODELS` or `ADAPTERS`; None if it is not installed."""
    return next((place for place in _places() if (place / script).is_file()), None)


def require_converter(script: str = MODELS) -> Path:
    """Return the folder with a converter.  Raises UserError, with the command that installs it."""
    missing = [name for name in _NEEDED if not _is_here(name)]
    if missing:
        raise UserError(f"GGUF needs {' and '.join(missing)}.", remedy=f"Install it: {GET_PACKAGES}")
    found = home(script)
    if found is None:
        raise UserError(
            f"GGUF needs llama.cpp's converter ({script}), which is not in this environment.",
            remedy=f"Bring it here (77 MB are downloaded, 2 MB kept): {GET_IT}",
        )
    return found


def convert(folder: Path, file: Path, *, dtype: str, adapter: Path | None = None) -> None:
    """Convert the model in a folder, or an adapter on that model, to a GGUF file, in a separate process.

    Of an adapter's base only the configuration is read.  Raises UserError with the converter's last message
    if it fails.
    """
    require_converter(MODELS if adapter is None else ADAPTERS)
    of_adapter = [] if adapter is None else [str(adapter)]
    done = subprocess.run(
        python("-m", "autosft.workers.tools.gguf_conversion", str(folder), str(file), dtype, *of_adapter),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0 or not file.is_file():
        file.unlink(missing_ok=True)
        what = "model" if adapter is None else "adapter"
        raise UserError(f"llama.cpp's converter does not take this {what}: {_reason(done.stderr)}.")


def install() -> Path:
    """Download the source package, check its hash and keep the converter; return the folder.

    Raises UserError if pip cannot download it.
    """
    found = home(ADAPTERS)  # installed together, by earlier versions without this one
    if found is not None:
        return found
    place = next(place for place in _places() if _can_write(place.parent))
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".converter-") as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{_SHA256}\n", encoding="utf-8")
        pip = ("-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes")
        done = subprocess.run(
            python(*pip, "--no-binary", "llama-cpp-python", "-d", scratch, "-r", str(wanted)),
            capture_output=True,
            text=True,
            check=False,
        )
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode != 0 or not archives:
            raise UserError(
                f"llama-cpp-python {VERSION} could not be downloaded: {_reason(done.stderr)}.",
                remedy="Try again where the package index can be reached.",
            )
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                name = member.name.removeprefix(_INSIDE)
                content = archive.extractfile(member)  # Python before 3.11.4 has no filter for `extract`
                if name != member.name and name.startswith(_KEPT) and content is not None:
                    target = unpacked / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
        if place.is_dir() and home(ADAPTERS) is None:
            place.rename(Path(scratch) / "earlier")
        if not place.is_dir():  # another process may have been faster
            unpacked.rename(place)
    return place


def _places() -> tuple[Path, ...]:
    name = f"llama.cpp-converter-{VERSION}"
    user = Path(platformdirs.user_data_dir("autosft"))
    return Path(sys.prefix) / "share" / "autosft" / name, user / name


def _can_write(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _is_here(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _reason(log: str) -> str:
    """Return the last informative line of a log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Writing:", "INFO:", "WARNING:hf-to-gguf:"))]
    last = (said or lines or ["it was killed, perhaps for lack of memory"])[-1]
    return last.removeprefix("ERROR:hf-to-gguf:").rstrip(".")


if __name__ == "__main__":
    try:
        print(install())  # noqa: T201 - a command of its own
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
