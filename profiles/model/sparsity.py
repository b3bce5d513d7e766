"""Count the weights of a saved model that are exactly zero, and recognise their pattern.

Weight files are read tensor by tensor, memory-mapped, so that a model larger than RAM can be checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.errors import UserError
from autosft.profiles.model.files import locate
from autosft.profiles.model.weight_keys import read_bin

if TYPE_CHECKING:
    import torch

#: A matrix with at least this share of zeros counts as pruned.  In dense ones zeros are rare; a padding
#: token's row in an embedding is a smaller share.
PRUNED_SHARE = 0.05
#: Sizes of groups and blocks that are recognised, most common first.
GROUP_SIZES = (4, 8, 16)
BLOCK_SIZES = (128, 64, 32, 16, 8, 4)
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSparsity:
    """The zeros of one weight matrix."""

    name: str
    shape: tuple[int, ...]
    num_values: int
    num_zeros: int
    pattern: str  # "dense", "unstructured", "2:4", "blocks of 16x16", "all zero"

    @property
    def share(self) -> float:
        return self.num_zeros / self.num_values

    @property
    def is_pruned(self) -> bool:
        return self.share >= PRUNED_SHARE

    @property
    def layer(self) -> str:
        """The number of its layer, or its name if it is outside the layers."""
        match = _LAYER.search(self.name)
        return match.group(1) if match else self.name.removesuffix(".weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSparsity:
    """The zeros of a model's weight matrices."""

    matrices: tuple[MatrixSparsity, ...]

    @property
    def pruned(self) -> tuple[MatrixSparsity, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.is_pruned)

    @property
    def share(self) -> float:
        """Share of zeros in all matrices."""
        return share_of(self.matrices)

    @property
    def pruned_share(self) -> float:
        """Share of zeros in the pruned matrices; 0 when there are none."""
        return share_of(self.pruned)

    @property
    def pattern(self) -> str:
        """The common pattern of all pruned matrices, else "mixed"; "dense" if none is pruned."""
        patterns = {matrix.pattern for matrix in self.pruned}
        return "dense" if not patterns else patterns.pop() if len(patterns) == 1 else "mixed"


def share_of(matrices: tuple[MatrixSparsity, ...]) -> float:
    """Return the share of zeros in some matrices; 0 for none."""
    num_values = sum(matrix.num_values for matrix in matrices)
    return sum(matrix.num_zeros for matrix in matrices) / num_values if num_values else 0.0


def read_sparsity(
    source: str,
    *,
    sample_bytes: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> ModelSparsity:
    """Count the zeros of a model in a local folder.

    With `sample_bytes`, only about that many bytes of matrices, evenly chosen, are read.  `progress` receives
    the share done.  Raises UserError for a source that is not a local folder with weights.
    """
    tensors = stored_matrices(source)
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    every = max(1, round(total_bytes / sample_bytes)) if sample_bytes else 1
    chosen = tensors[every // 2 :: every] or tensors[:1]
    matrices = []
    for done, one in enumerate(chosen):
        matrices.append(count_zeros(one.name, one.load()))
        if progress is not None:
            progress((done + 1) / len(chosen))
    return ModelSparsity(matrices=tuple(matrices))


def count_zeros(name: str, matrix: torch.Tensor) -> MatrixSparsity:
    """Count the zeros of a parameter of two or more dimensions and recognise their pattern."""
    zero = matrix == 0
    num_zeros = int(zero.sum())
    share = num_zeros / zero.numel()
    return MatrixSparsity(
        name=name,
        shape=tuple(zero.shape),
        num_values=zero.numel(),
        num_zeros=num_zeros,
        pattern="dense" if share < PRUNED_SHARE else "all zero" if share == 1 else _pattern(zero),
    )


def _pattern(zero: torch.Tensor) -> str:
    """Return the tightest pattern of the zeros: whole blocks, n of m in a row, or none."""
    rows, columns = zero.shape[0], zero[0].numel()
    flat = zero.reshape(rows, columns)
    for size in BLOCK_SIZES:
        if rows % size == 0 and columns % size == 0:
            in_blocks = flat.reshape(rows // size, size, columns // size, size).sum(dim=(1, 3))
            if bool(((in_blocks == 0) | (in_blocks == size * size)).all()):
                return f"blocks of {size}x{size}"
    for size in GROUP_SIZES:
        if columns % size == 0:
            fewest = int(flat.reshape(-1, size).sum(dim=1).min())
            if fewest >= size // 2:  # fewer happen by chance in a short row
                return f"{size - fewest}:{size}"
    return "unstructured"


def num_lost(before: str, after: str) -> int:
    """Count the weights that are zero in folder `before` and no longer in folder `after`, matrix by matrix.

    Raises UserError if the second lacks a matrix of the first, or has it in another shape.
    """
    trained = {matrix.name: matrix for matrix in stored_matrices(after)}
    num = 0
    for matrice in stored_matrices(before):
        if matrice.name not in trained:
            raise UserError(
                f"{after} has no {matrice.name}.", remedy="Compare a model with what was trained from it."
            )
        zero, later = matrice.load() == 0, trained[matrice.name].load()
        if zero.shape != later.shape:
            raise UserError(
                f"{matrice.name} is {tuple(zero.shape)} in {before} and {tuple(later.shape)} in {after}.",
                remedy="Compare a model with what was trained from it.",
            )
        num += int((later[zero] != 0).sum())
    return num


def stored_matrices(source: str) -> list[StoredMatrix]:
    """List the matrices in a local folder's weight files.  Raises UserError for anything else."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{source} is not a local folder.",
            remedy="Zeros are counted in weight files: download the model first, and give its folder.",
        )
    located = locate(str(folder), for_training=False)
    if not located.weights:
        raise UserError(f"{source} has no weight files.", remedy="Give a folder that save_pretrained wrote.")
    return [matrix for name, _ in located.weights for matrix in _matrices(folder / name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """A matrix in a weight file."""

    name: str
    num_bytes: int
    load: Callable[[], torch.Tensor]


def _matrices(path: Path) -> Iterator[StoredMatrix]:
    """Yield the matrices of a weight file, without reading them where the format allows it."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        file: Any = safe_open(str(path), framework="pt")  # open until the last `load` is gone
        for name in file.keys():  # noqa: SIM118  # not a dict
            piece = file.get_slice(name)
            if _is_matrix(name, len(piece.get_shape())):
                yield StoredMatrix(
                    name=name,
                    num_bytes=_num_bytes(piece.get_shape(), piece.get_dtype()),
                    load=lambda name=name: file.get_tensor(name),  # type: ignore[misc]
                )
        return
    for name, tensor in read_bin(path, map_location="cpu").items():
        if _is_matrix(name, tensor.dim()):
            yield StoredMatrix(name=name, num_bytes=tensor.nbytes, load=lambda tensor=tensor: tensor)  # type: ignore[misc]


def _is_matrix(name: str, num_dimensions: int) -> bool:
    """Whether a tensor holds weights, of which zeros can be pruned.

    A logarithm is none: in a state-space model's `A_log`, as it starts, zeros stand for 1.
    """
    return num_dimensions >= 2 and not name.endswith("_log")


def _num_bytes(shape: list[int], dtype: str) -> int:
    bits = int("".join(filter(str.isdigit, dtype.partition("_")[0])) or 8)
    return math.prod(shape) * bits // 8
