"""Check that a checkpoint holds exactly the weights of its model, by name and shape.

transformers initialises missing weights randomly, drops unexpected ones, and only logs both; here both are
errors.  `check_checkpoint` finds them in the files' headers before anything starts, with transformers' own
conversions, so that experts that are stored one by one or a renamed prefix are accepted; `require_whole`
checks the report of a real load.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.errors import UserError
from autosft.profiles.json_files import parse_json_object
from autosft.profiles.model.quantization import whole_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

#: Prefixes that wrappers leave in the names of weights, and how to save without them.
WRAPPERS: Mapping[str, str] = {
    "_orig_mod.": "torch.compile's: save with model._orig_mod.save_pretrained(FOLDER)",
    "_fsdp_wrapped_module.": "FSDP's: save with accelerator.get_state_dict(model), or merge the shards",
    "_checkpoint_wrapped_module.": "activation checkpointing's: save the model without its wrapper",
    "base_model.model.": "peft's: save with model.merge_and_unload().save_pretrained(FOLDER), or save the "
    "adapter alone with model.save_pretrained(FOLDER)",
    "module.": "DistributedDataParallel's or DeepSpeed's: save with model.module.save_pretrained(FOLDER)",
}

#: Parts of multimodal models that a text-only language model omits.
_NOT_TEXT = re.compile(
    r"vision|visual|image|img|audio|speech|sound|video|projector|merger|multi_modal|mm_|talker|code2wav|"
    r"connector|resampler|perceiver|aligner"
)
#: Tensors that older versions of transformers saved with a model, and that follow from its configuration.
_CONSTANT = re.compile(r"\.(masked_bias|inv_freq|cos_cached|sin_cached|position_ids|causal_mask)$")
_NUM_SHOWN = 3


def require_whole(
    report: Mapping[str, Any], source: str, config: PreTrainedConfig, *, composite: bool = False
) -> None:
    """Raise UserError if a load left weights random or dropped some.

    `report` is that of `from_pretrained(..., output_loading_info=True)`, which omits tied weights and those
    that the model's class declares optional.  Accepted are layers for multi-token prediction, which
    transformers' classes do not have, and with `composite` the towers of a multimodal model of which only the
    text model is trained.
    """
    missing = sorted(report["missing_keys"])
    mismatched = sorted(report["mismatched_keys"])
    unexpected = sorted(
        key
        for key in report["unexpected_keys"]
        if not (
            _is_extra_prediction(key, config)
            or _CONSTANT.search(key)
            or (composite and _NOT_TEXT.search(key))
        )
    )
    if not (missing or mismatched or unexpected):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights of the model are missing in it ({_first(missing)})")
    if mismatched:
        name, stored, wanted = mismatched[0]
        shapes = f"{name} is {list(stored)}, the model's {list(wanted)}"
        parts.append(f"{len(mismatched)} have another shape ({shapes})")
    if unexpected:
        parts.append(f"{len(unexpected)} of its tensors have no place in the model ({_first(unexpected)})")
    raise UserError(
        f"{source} does not hold the weights that its config.json describes: {'; '.join(parts)}. "
        "Training would start from random weights or lose some.",
        remedy=_remedy(unexpected),
    )


def require_whole_adapter(missing: Collection[str], unexpected: Collection[str], source: str) -> None:
    """Raise UserError if an adapter was loaded with missing or unexpected weights."""
    if not (missing or unexpected):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights of the adapter are missing in it ({_first(sorted(missing))})")
    if unexpected:
        parts.append(f"{len(unexpected)} of its tensors have no place ({_first(sorted(unexpected))})")
    raise UserError(
        f"{source} does not hold the adapter that its adapter_config.json describes: {'; '.join(parts)}.",
        remedy="Save it again with peft's model.save_pretrained(FOLDER), or copy the folder again.",
    )


def check_checkpoint(
    model: PreTrainedModel,
    source: str,
    files: Sequence[Path],
    *,
    quantization_config: Any = None,
    stored_quantization: Mapping[str, Any] | None = None,
    composite: bool = False,
) -> None:
    """Compare the names and shapes in weight files with a model on the meta device.  Raises UserError.

    Reads only headers (milliseconds) and no weights.  `stored_quantization` is the checkpoint's configuration
    of its quantization, `quantization_config` the one that dequantizes it.
    """
    config = copy.deepcopy(model.config)
    if stored_quantization is not None:
        config.quantization_config = dict(stored_quantization)
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= stored_tensors(path)
    if stored_quantization is None:
        require_numbers(model, source, tensors)
    with quiet_loading(), whole_blocks(stored_quantization):
        try:
            _, report = type(model).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                quantization_config=quantization_config,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception:  # a model's code may need values; the real load is checked too
            return
    require_whole(report, source, model.config, composite=composite)


def require_numbers(model: PreTrainedModel, source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where weights of a model are stored as whole numbers, which are codes of something."""
    codes = sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and name in tensors
        and not (tensors[name].is_floating_point() or tensors[name].is_complex())
    )
    if codes:
        dtype = str(tensors[codes[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{source} holds {len(codes)} weights as {dtype} ({_first(codes)}), which are codes of a "
            "quantized model, and config.json has no quantization_config that says how to read them.",
            remedy="Give the unquantized model that it was made from.",
        )


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight file on the meta device.  Raises UserError for a broken file."""
    if path.suffix != ".safetensors":
        return read_bin(path, map_location="meta")
    import torch

    return {
        name: torch.empty(tensor["shape"], dtype=_torch_dtype(tensor["dtype"]), device="meta")
        for name, tensor in read_header(path).items()
    }


def read_bin(path: Path, *, map_location: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled weight file, without executing anything else in it.

    Raises UserError for any other file.
    """
    import torch

    try:
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        found = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # torch's message explains how to load it anyway
        is_code = isinstance(error, pickle.UnpicklingError)
        why = (
            "it holds Python objects other than weights, which could run code" if is_code else "it is damaged"
        )
        raise UserError(
            f"{path} cannot be read as weights: {why}.",
            remedy="Copy or download the model again, or save it as safetensors.",
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} cannot be read as weights: it holds no tensors by name.",
            remedy="Save it with save_pretrained, or as safetensors.",
        )
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}


#: The largest header that safetensors itself accepts.
MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors file's header: dtype, shape and data_offsets by tensor name.

    Raises UserError for other files, and for an invalid header: too long, or with tensors outside the file.
    """
    remedy = "Fetch it: git lfs pull" if _is_pointer(path) else "Copy or download the model again."
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 0 < num_bytes <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path} is not a safetensors file.", remedy=remedy)
            content = file.read(num_bytes)
    except OSError:
        raise UserError(f"{path} is not a safetensors file.", remedy=remedy) from None
    try:
        header = parse_json_object(content, name=str(path), remedy=remedy)
    except UserError:
        raise UserError(f"{path} is not a safetensors file.", remedy=remedy) from None
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    for name, tensor in tensors.items():
        if not _is_tensor(tensor, num_data_bytes=size - 8 - num_bytes):
            raise UserError(
                f"{path} is damaged: its header has an invalid entry for {name[:100]}.", remedy=remedy
            )
    return tensors


def _is_tensor(tensor: object, *, num_data_bytes: int) -> bool:
    """Return whether a header's entry for a tensor is valid."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str):
        return False
    shape, offsets = tensor.get("shape"), tensor.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return False
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, *offsets)):
        return False
    return bool(offsets[0] <= offsets[1] <= num_data_bytes)


def _is_pointer(path: Path) -> bool:
    """Whether a file is what git leaves in the place of one that git lfs has."""
    try:
        with path.open("rb") as file:
            return file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress transformers' progress bar and its report of names, which autosft checks itself."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers.modeling_utils")
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def is_composite(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is of a multimodal model."""
    return any(name not in ("text_config", "decoder") for name in getattr(config, "sub_configs", {}))


def _torch_dtype(name: str) -> torch.dtype:
    import torch
    from safetensors.torch import _TYPES

    dtype: torch.dtype = _TYPES.get(name, torch.uint8)
    return dtype


def _is_extra_prediction(key: str, config: PreTrainedConfig) -> bool:
    """Return whether a tensor belongs to multi-token prediction layers after the model's last layer."""
    text = config.get_text_config()
    if re.search(r"(^|\.)mtp\.", key):
        return True
    extra = int(getattr(text, "num_nextn_predict_layers", None) or 0)
    first = int(getattr(text, "num_hidden_layers", 0))
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    return extra > 0 and found is not None and first <= int(found[1]) < first + extra


def _remedy(unexpected: Sequence[str]) -> str:
    for mark, advice in WRAPPERS.items():
        if any(key.startswith(mark) or f".{mark}" in key for key in unexpected):
            return f"Names with {mark!r} are {advice}."
    if any(key.endswith(("_scale_inv", ".qweight", ".qzeros", "_blocks", "_scales")) for key in unexpected):
        return "The weights look quantized, and config.json has no quantization_config that says how."
    return "Save the model again with save_pretrained, or see whether config.json belongs to these weights."


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", …" if len(names) > _NUM_SHOWN else "")
