"""A folder that is a model itself and holds the checkpoints that it was chosen from below it.

What lies at its top is what `from_pretrained`, peft and servers read: weights, configuration, tokenizer with
its template, generation_config.json; with a manifest of their hashes.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path

from autosft.studies.files.checkpoints import MANIFEST

#: Of a checkpoint, what training alone needs.
NOT_OF_THE_MODEL = (
    "optimizer*",
    "scheduler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    "scaler.pt",
    MANIFEST,
)


def install_model(checkpoint: Path, folder: Path) -> None:
    """Put a checkpoint's model at the top of a folder, in the place of an earlier one.

    Files are linked where the file system can, since the checkpoint below stays.  The manifest is removed
    first and written last: a folder with one is whole.
    """
    manifest = folder / MANIFEST
    earlier = _names_in(manifest)
    sealed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    entries = {name: entry for name, entry in sealed.items() if is_of_the_model(name)}
    manifest.unlink(missing_ok=True)
    for name in earlier - entries.keys():
        (folder / name).unlink(missing_ok=True)
    for name in entries:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(checkpoint / name, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(checkpoint / name, partial)
        partial.replace(target)
        partial.unlink(missing_ok=True)  # two links of one file: renaming does nothing then
    partial = manifest.with_suffix(".partial")
    partial.write_text(json.dumps({"version": 1, "files": entries}, indent=1), encoding="utf-8")
    partial.replace(manifest)


def is_of_the_model(name: str) -> bool:
    """Whether a file of a checkpoint is part of the model that it holds."""
    top = name.partition("/")[0]
    return not any(fnmatch.fnmatch(top, pattern) for pattern in NOT_OF_THE_MODEL)


def _names_in(manifest: Path) -> set[str]:
    try:
        return set(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
