"""Choose one precision for all saved models that are compared, so that none differs by rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import base_of
from autosft.profiles.model.gguf import plain_folder
from autosft.workers.device import local_device

#: The share of a CPU's memory left free when weights are converted to fp32.
SHARE_OF_MEMORY = 0.8


def common_dtype(sources: Sequence[str]) -> str:
    """Return torch's name of the dtype in which all models' weights are loaded.

    On a CPU fp32, since 16-bit arithmetic is emulated there and slower (2.4 times in generation, measured on
    SmolLM2-135M), unless fp32 weights would not fit.  On a GPU the common stored dtype ("auto"), or bf16 if
    they differ.
    """
    homes = [base_of(source) or source for source in sources]
    if local_device().torch_name == "cpu":
        need = sum(weight_bytes(home) * 4 / dtype_bytes(stored_dtype(home)) for home in homes)
        if need <= psutil.virtual_memory().available * SHARE_OF_MEMORY:
            return "float32"
    stored = {stored_dtype(home) for home in homes}
    return "auto" if len(stored) == 1 else "bfloat16"


def stored_dtype(source: str) -> str:
    """Return what config.json says the weights are stored in; "float32" where it does not.

    The file is read and no class of it made: transformers would ask at the terminal whether a folder's own
    code may be run.
    """
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(plain_folder(source))
    except (OSError, ValueError, UserError):  # unreadable files are refused when loaded
        return "float32"
    places = (values, values.get("text_config") or {})
    found = [place[name] for place in places for name in ("dtype", "torch_dtype") if place.get(name)]
    return str(found[0] if found else "float32").removeprefix("torch.")


def dtype_bytes(name: str) -> int:
    return 2 if name in ("bfloat16", "float16") else 4


def weight_bytes(source: str) -> int:
    """Return the bytes of the weight files in a folder; 0 if it does not exist on this machine."""
    folder = Path(source).expanduser()
    files = folder.iterdir() if folder.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin"))
