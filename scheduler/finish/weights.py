"""The weights that `autosft export` writes: what a checkpoint holds, and how it is copied or merged."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG, base_of
from autosft.profiles.model.files import stored_dtype
from autosft.studies.files.checkpoints import slug
from autosft.workers.tools.merge_process import merge_adapter, write_model
from autosft.workers.tools.shared_files import copy_tokenizer_model, share_as_folder

#: `--dtype` by torch's name of it.
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
#: Files of a checkpoint for resuming training, and its manifest.
_OF_TRAINING = (
    "optimizer*",
    "scheduler.pt",
    "rng_state*",
    "trainer_state.json",
    "manifest.json",
    "README.md",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model to be exported: a checkpoint of a whole model or of an adapter."""

    name: str  # its name in other programs
    checkpoint: Path
    base: str | None  # model that it was trained from or adapts; None if unknown
    is_adapter: bool
    trust_remote_code: bool = False

    @property
    def dtype(self) -> str | None:
        """The dtype that the base's weights are stored in, else the checkpoint's; None if unknown."""
        known = None if self.base is None else stored_dtype(self.base)
        return known or stored_dtype(str(self.checkpoint))


def weights_in(folder: Path, *, trust_remote_code: bool = False) -> Weights:
    """Return the weights in a folder: of a model, an adapter, or the last checkpoint of a run.

    Raises UserError for any other folder.
    """
    place = folder
    if not _holds_weights(folder):
        checkpoints = sorted(path for path in folder.glob("**/checkpoints/step-*") if _holds_weights(path))
        if not checkpoints:
            raise UserError(
                f"{folder} holds no model: no config.json, no {ADAPTER_CONFIG}, no checkpoints.",
                remedy="Name a study, or the folder of a checkpoint, an adapter or a model.",
            )
        place = checkpoints[-1]
    base = base_of(str(place)) if (place / ADAPTER_CONFIG).is_file() else None
    return Weights(
        name=slug(folder.resolve().name),
        checkpoint=place,
        base=base,
        is_adapter=base is not None,
        trust_remote_code=trust_remote_code,
    )


def _holds_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def merged(weights: Weights, output: Path, *, dtype: str | None, keep_zeros: bool = False) -> tuple[str, ...]:
    """Merge an adapter into its base; return notes for the user."""
    assert weights.base is not None
    return merge_adapter(
        weights.checkpoint,
        output,
        base=weights.base,
        dtype=dtype,
        keep_zeros=keep_zeros,
        trust_remote_code=weights.trust_remote_code,
    )


def write_weights(
    weights: Weights, output: Path, *, merge: bool, dtype: str | None, keep_zeros: bool = False
) -> tuple[str, ...]:
    """Write a checkpoint into a folder that transformers can load; return notes for the user.

    An adapter is copied, or with `merge` written as a whole model.  Whole models are written in `dtype`, by
    default that of the base's weights.  Raises UserError if the written model differs.
    """
    if weights.is_adapter and not merge:
        if dtype is not None:
            raise UserError(
                "--dtype: an adapter is exported as it was trained.", remedy="Add --merge, or remove --dtype."
            )
        copy_checkpoint(weights.checkpoint, output, base=weights.base)
        return ()
    wanted = None if dtype is None else TORCH_DTYPES[dtype]
    if weights.is_adapter:
        return merged(weights, output, dtype=wanted, keep_zeros=keep_zeros)
    wanted = wanted or weights.dtype
    if (
        wanted is None
        or wanted not in TORCH_DTYPES.values()
        or wanted == stored_dtype(str(weights.checkpoint))
    ):
        copy_checkpoint(weights.checkpoint, output, base=weights.base)
        return ()
    return write_model(weights.checkpoint, output, dtype=wanted, trust_remote_code=weights.trust_remote_code)


def copy_checkpoint(checkpoint: Path, output: Path, *, base: str | None) -> None:
    """Copy a checkpoint byte by byte, without the files for resuming training."""
    ignore = shutil.ignore_patterns(*_OF_TRAINING)
    shutil.copytree(checkpoint, output, ignore=ignore, dirs_exist_ok=True)
    copy_tokenizer_model(output, base)
    share_as_folder(output)
