"""Read a folder with a peft adapter: its base model, and its settings, to continue training it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.json_files import read_json_object
from autosft.profiles.recipe import AdapterSettings
from autosft.profiles.sources import full_path

ADAPTER_CONFIG = "adapter_config.json"
#: Any of these files means that a folder has a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_WHOLE = ("model*.safetensors", "pytorch_model*.bin")

#: Fields of peft's LoraConfig that our settings cover, and those that do not affect training.
_OURS = ("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora")
_OF_NO_MATTER = (
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "init_lora_weights",
    "runtime_config",
)


def is_adapter_folder(source: str) -> bool:
    """Return whether `--model` is a folder that holds an adapter; its base's config.json may lie beside it.

    Raises UserError for a folder that also holds the weights of a whole model: transformers would load the
    adapter on its base, whatever these weights are.
    """
    folder = Path(source).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if whole := sorted(path.name for pattern in _WHOLE for path in folder.glob(pattern)):
        raise UserError(
            f"{source} holds both an adapter ({ADAPTER_CONFIG}) and weights of a whole model ({whole[0]}).",
            remedy="Keep one of the two in the folder.",
        )
    return True


def base_of(source: str) -> str | None:
    """Return the base model that an adapter's folder or hub id names, None for a whole model.

    A relative path is resolved against the current folder and the adapter's folder.  Raises UserError if the
    base model does not exist.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(source).expanduser()
    if folder.is_file() or (folder.is_dir() and not is_adapter_folder(source)):
        return None
    found = find_adapter_config_file(str(folder) if folder.is_dir() else source)
    if found is None:
        return None
    base = str(read_config(Path(found)).get("base_model_name_or_path") or "")
    for place in (Path(base).expanduser(), folder / base):
        if base and place.exists():
            if is_adapter_folder(str(place)):
                raise UserError(
                    f"{source} is an adapter on {base}, which is an adapter itself.",
                    remedy=f"Merge that one first: autosft export {base} --format hub --merge; then set "
                    "base_model_name_or_path in adapter_config.json to the merged model.",
                )
            return full_path(str(place))
    if not base or Path(base).is_absolute() or base.startswith((".", "~")):
        raise UserError(
            f"{source} is an adapter on {base or 'a base model that it does not name'}, which is not there.",
            remedy="Put the base model back, or set base_model_name_or_path in adapter_config.json.",
        )
    return base


def read_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json.  Raises UserError for an invalid one."""
    return read_json_object(path, remedy="Copy the adapter's folder again.")


def settings_of(folder: Path) -> AdapterSettings:
    """Return the settings of a LoRA adapter that training can continue from.

    Raises UserError for other kinds, and for options that our settings do not cover.
    """
    values = read_config(folder / ADAPTER_CONFIG)
    remedy = "Give --merge-adapter to write it into its base model first and train that."
    kind = str(values.get("peft_type"))
    if kind != "LORA":
        raise UserError(
            f"--model {folder} is a {kind} adapter; training goes on from LoRA alone.", remedy=remedy
        )
    defaults = _defaults()
    unlike = [
        name
        for name, value in values.items()
        if name not in (*_OURS, *_OF_NO_MATTER) and value and value != defaults.get(name)
    ]
    if unlike:
        raise UserError(
            f"--model {folder}: the adapter has {unlike[0]} = {values[unlike[0]]!r}, which "
            "training does not go on from.",
            remedy=remedy,
        )
    targets = values.get("target_modules")
    if not isinstance(targets, list):
        raise UserError(f"--model {folder}: its target_modules are {targets!r}, not names.", remedy=remedy)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(
            f"--model {folder} has no weights of the adapter (none of {', '.join(WEIGHT_FILES)}).",
            remedy="Copy or download the folder again.",
        )
    return AdapterSettings(
        rank=int(values["r"]),
        alpha=float(values["lora_alpha"]),
        targets=tuple(sorted(targets)),
        dropout=float(values.get("lora_dropout") or 0.0),
        use_rslora=bool(values.get("use_rslora")),
        use_dora=bool(values.get("use_dora")),
    )


def _defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return dict(LoraConfig().to_dict())
