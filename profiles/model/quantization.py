"""Determine which checkpoints with quantized weights can be trained, and how they are loaded.

A checkpoint is quantized if its config.json has a `quantization_config`.  Training needs dequantized weights:
what transformers can dequantize on loading is dequantized, a bitsandbytes 4-bit checkpoint can also be used
for QLoRA as it is, and every other kind is refused by name.  Supported kinds are those of transformers 5.23
(`transformers.quantizers`).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A kind of quantized checkpoint that can be trained."""

    label: str
    config_class: str | None = None  # transformers' class, whose `dequantize=True` dequantizes on loading
    package: str | None = None  # the distribution that dequantizing needs


#: By `quant_method`; bitsandbytes has one row per number of bits (`scheme_name`).
SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(label="FP8", config_class="FineGrainedFP8Config"),
    "mxfp8": Scheme(label="MXFP8", config_class="FineGrainedFP8Config"),
    "mxfp4": Scheme(label="MXFP4", config_class="Mxfp4Config"),
    "compressed-tensors": Scheme(
        label="compressed-tensors", config_class="CompressedTensorsConfig", package="compressed-tensors"
    ),
    "bitsandbytes-4bit": Scheme(label="bitsandbytes 4-bit", package="bitsandbytes"),
    "bitsandbytes-8bit": Scheme(label="bitsandbytes 8-bit", package="bitsandbytes"),
}

BNB_4BIT = "bitsandbytes-4bit"


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return a configuration's `quantization_config` as a dictionary, None for plain weights."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not found:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def scheme_name(quantization: Mapping[str, Any]) -> str:
    """Return the key in SCHEMES of a `quantization_config`, or its own name for other kinds."""
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return BNB_4BIT
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return "bitsandbytes-8bit"
    method = quantization.get("quant_method")
    if method is None and {"bits", "group_size"} <= quantization.keys():
        return "MLX"
    return str(getattr(method, "value", method) or "unknown")


def require_trainable(
    source: str, quantization: Mapping[str, Any] | None, *, is_read_here: bool
) -> str | None:
    """Return a checkpoint's key in SCHEMES, None for plain weights.

    Raises UserError, before anything is started, for a kind that cannot be dequantized and, if it will be
    read here, for one that needs a missing package.
    """
    if quantization is None:
        return None
    name = scheme_name(quantization)
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise UserError(
            f"--model {source} is quantized ({name}), and transformers cannot dequantize that: its weights "
            "are codes, not numbers that can be trained.",
            remedy="Give the unquantized model that it was made from. Dequantized on loading are "
            f"{', '.join(known.label for known in SCHEMES.values())}.",
        )
    if (
        is_read_here
        and scheme.package is not None
        and importlib.util.find_spec(scheme.package.replace("-", "_")) is None
    ):
        raise UserError(
            f"--model {source} is quantized ({scheme.label}), and reading it takes {scheme.package}, "
            "which is not installed.",
            remedy=f"pip install {scheme.package}, or give the unquantized model that it was made from.",
        )
    return name


def can_be_read(name: str | None) -> bool:
    """Return whether the package that reads such a checkpoint is installed, if it needs one."""
    package = None if name is None else SCHEMES[name].package
    return package is None or importlib.util.find_spec(package.replace("-", "_")) is not None


def why_no_method(name: str | None, method: Method) -> str:
    """Return the reason why a method cannot train a checkpoint of a scheme; empty when it can."""
    if method is Method.QLORA and name not in (None, BNB_4BIT):
        assert name is not None
        return (
            f"its weights are stored as {SCHEMES[name].label}, and transformers cannot quantize them to "
            "4 bits again while it loads them"
        )
    return ""


def require_method(source: str, name: str | None, method: Method) -> None:
    """Raise UserError if a method cannot train a checkpoint of a scheme."""
    if reason := why_no_method(name, method):
        raise UserError(
            f"--model {source} --method {method.value}: {reason}.",
            remedy="Use --method lora (on the dequantized weights), or give the unquantized model.",
        )


def dequantizing_config(name: str | None) -> Any | None:
    """Return the configuration with which `from_pretrained` dequantizes a checkpoint on loading.

    None for plain weights, and for bitsandbytes', which are dequantized after they are loaded.
    """
    import transformers

    config_class = None if name is None else SCHEMES[name].config_class
    if config_class is None:
        return None
    return getattr(transformers, config_class)(dequantize=True)


@contextlib.contextmanager
def whole_blocks(quantization: Mapping[str, Any] | None) -> Iterator[None]:
    """Dequantize FP8 weights whose sides are no multiples of their blocks as the blocks are.

    transformers 5.23 takes the size of blocks from the number of scales: 192 rows with two scales, of blocks
    of 128 and 64, are dequantized as two blocks of 96, which is wrong without a word, and 576 rows with five
    (DeepSeek-V3's `kv_a_proj_with_mqa`) end the load.  Here such weights are filled up with zeros first.
    """
    sizes = (quantization or {}).get("weight_block_size")
    if not (isinstance(sizes, Sequence) and len(sizes) == 2):
        yield
        return
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    dequantize = Fp8Dequantize._dequantize_one

    def by_blocks(self: Any, quantized: Any, scales: Any, **options: Any) -> Any:
        import torch

        rows, columns = quantized.shape[-2:]
        num_blocks = (-(-rows // sizes[0]), -(-columns // sizes[1]))
        missing = (num_blocks[0] * sizes[0] - rows, num_blocks[1] * sizes[1] - columns)
        if tuple(scales.shape[-2:]) != num_blocks or not any(missing) or not quantized.is_floating_point():
            return dequantize(self, quantized, scales, **options)
        filled = torch.nn.functional.pad(quantized.to(torch.float32), (0, missing[1], 0, missing[0]))
        whole = dequantize(self, filled, scales, **options)
        return whole[..., :rows, :columns].contiguous()

    Fp8Dequantize._dequantize_one = by_blocks
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = dequantize


def is_loaded_in_4bit(name: str | None, method: Method) -> bool:
    """Return whether training uses a checkpoint's own 4-bit weights."""
    return name == BNB_4BIT and method is Method.QLORA


def describe(name: str | None) -> str | None:
    """Return a note on how a quantized checkpoint's weights are used; None for plain ones."""
    if name is None:
        return None
    label = SCHEMES[name].label
    if name == BNB_4BIT:
        return (
            f"The weights are stored as {label}: --method qlora trains on them as they are, every other "
            "method on the dequantized weights."
        )
    return (
        f"The weights are stored as {label}: training, memory and checkpoints are of the dequantized weights."
    )
