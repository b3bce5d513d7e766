"""What to give instead of a folder that holds no model, by what it does hold."""

from __future__ import annotations

from pathlib import Path

_PLAIN = "Give the folder that save_pretrained wrote, or a hub id."


def what_to_give(folder: Path, otherwise: str = _PLAIN) -> str:
    """Return a remedy for a folder that is no whole model: `otherwise` if nothing is near."""
    if not folder.is_dir():
        return otherwise
    names = sorted(folder.iterdir())
    if broken := next((path for path in names if path.is_symlink() and not path.exists()), None):
        return f"{broken.name} is a link to a file that is not there: copy the folder with cp -rL, or again."
    if files := [path for path in names if path.suffix.lower() == ".gguf"]:
        return f"It holds a GGUF file: give {files[0]}"
    if any(path.name == "zero_to_fp32.py" for path in names):
        return "It holds shards of DeepSpeed: run its zero_to_fp32.py, which writes a model's weights."
    if any(path.suffix == ".distcp" for path in [*names, *folder.glob("*/*.distcp")]):
        return "It holds shards of FSDP: accelerate merge-weights joins them to a model's weights."
    inner = [path.parent for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/config.json"))]
    if inner:
        newest = max(inner, key=lambda path: path.stat().st_mtime)
        more = f" (one of {len(inner)} with a config.json)" if len(inner) > 1 else ""
        return f"Its subfolder may be the model: give {newest}{more}"
    return otherwise
