"""The weights that `autosft export` writes: what a checkpoint holds, and how it is copied or merged."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import ADAPTER_CONFIG, base_of
from autosft.profiles.model.files import stored_dtype
from autosft.scheduler.finish.given_models import Kind, resolve_model
from autosft.studies.files.checkpoints import MANIFEST, slug
from autosft.studies.files.model_folder import is_of_the_model
from autosft.workers.tools.merge_process import merge_adapter, write_model
from autosft.workers.tools.shared_files import copy_tokenizer_model, share_as_folder

#: `--dtype` by torch's name of it.
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
CARD = "README.md"  # peft's and the trainer's; an export for the hub has one of its own


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


def weights_in(given: Path, *, trust_remote_code: bool = False) -> Weights:
    """Return what a folder holds: a model, an adapter, a run of `autosft train` (its best), or its best.yaml.

    Raises UserError for anything else.
    """
    model = resolve_model(str(given), ())
    if model.kind is Kind.GGUF:
        raise UserError(f"{given} is a GGUF file already.", remedy="Name the model that it was tuned into.")
    place = Path(model.source)
    base = base_of(str(place)) if (place / ADAPTER_CONFIG).is_file() else None
    return Weights(
        name=slug(given.resolve().stem if given.is_file() else given.resolve().name),
        checkpoint=place,
        base=base,
        is_adapter=base is not None,
        trust_remote_code=trust_remote_code,
    )


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
    """Copy a checkpoint's model byte by byte, without the files for resuming training or folders below it."""
    manifest = checkpoint / MANIFEST
    if manifest.is_file():
        names = list(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    else:
        names = [path.name for path in checkpoint.iterdir() if path.is_file()]
    for name in names:
        if is_of_the_model(name) and name != CARD:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, output / name)
    copy_tokenizer_model(output, base)
    share_as_folder(output)
