"""Detect checkpoints with a separate output head although their configuration ties it to the embeddings.

transformers then loads both and ties nothing; that model is trained, counted and predicted.  Such checkpoints
come from programs that untie a model without changing `tie_word_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.model.weight_keys import read_bin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

#: How many rows, spread over the vocabulary, are compared: a matrix may have a gigabyte.
_NUM_ROWS = 256

NOTE = (
    "Its output head is not its embeddings, which config.json ties: both are trained, and checkpoints say so "
    "(tie_word_embeddings is false in their config.json)."
)


def has_own_head(model: PreTrainedModel, files: Sequence[Path]) -> bool:
    """Return whether weight files have a head that differs from the embeddings that the model ties it to."""
    for head, embeddings in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        pair = [rows for name in (head, embeddings) for rows in _rows(name, files)]
        if len(pair) == 2 and not _are_equal(*pair):
            return True
    return False


def untie(config: PreTrainedConfig) -> None:
    """Set a configuration to separate weights for head and embeddings."""
    for one in {id(item): item for item in (config, config.get_text_config())}.values():
        if getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False


def _rows(name: str, files: Sequence[Path]) -> Iterator[torch.Tensor]:
    """Yield some rows of a tensor, if one of the files has it."""
    for path in files:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as file:
                if name in file.keys():  # noqa: SIM118  # not a dict
                    yield _some(file.get_slice(name), file.get_slice(name).get_shape()[0])
        else:
            found = read_bin(path, map_location="cpu")
            if name in found:
                yield _some(found[name], len(found[name]))


def _some(matrix: Any, num_rows: int) -> torch.Tensor:
    import torch

    return torch.cat([matrix[row : row + 1] for row in range(0, num_rows, max(1, num_rows // _NUM_ROWS))])


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.shape == other.shape and torch.equal(one, other)
