"""Zeros of a saved model: counted, their pattern named, and compared with a trained one's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autosft.profiles.errors import UserError
from autosft.profiles.model.sparsity import count_zeros, num_lost, read_sparsity


def checker(size: int, rows: int = 64, columns: int = 64) -> torch.Tensor:
    row, column = torch.arange(rows) // size, torch.arange(columns) // size
    return ((row.unsqueeze(1) + column) % 2).float()


def random(share: float) -> torch.Tensor:
    return (torch.rand((64, 64), generator=torch.Generator().manual_seed(0)) >= share).float()


@pytest.mark.parametrize(
    ("matrix", "pattern"),
    [
        (torch.ones(64, 64), "dense"),
        (random(0.01), "dense"),
        (random(0.3), "unstructured"),
        (checker(16), "blocks of 16x16"),
        (checker(4), "blocks of 4x4"),
        (torch.tensor([[1.0, 0, 2, 0, 0, 3, 4, 0]]).repeat(64, 8), "2:4"),
        (torch.tensor([[1.0, 0, 0, 0, 0, 3, 0, 0]]).repeat(64, 8), "1:4"),
        (torch.zeros(64, 64), "all zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_pattern_of_a_matrix(matrix: torch.Tensor, pattern: str) -> None:
    counted = count_zeros("model.layers.3.mlp.up_proj.weight", matrix)
    assert counted.pattern == pattern
    assert counted.num_zeros == int((matrix == 0).sum())
    assert counted.layer == "3"


def folder(path: Path, **matrices: torch.Tensor) -> str:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({name.replace("__", "."): one for name, one in matrices.items()}, path / "model.safetensors")
    return str(path)


def test_a_folder_is_the_sum_of_its_matrices(tmp_path: Path) -> None:
    half = torch.tensor([[0.0, 1.0]]).repeat(8, 4)
    name = folder(tmp_path / "m", a__weight=half, b__weight=torch.ones(8, 24), norm=torch.zeros(8))
    read = read_sparsity(name)
    assert (read.share, read.pruned_share) == (32 / 256, 0.5)
    assert [item.name for item in read.pruned] == ["a.weight"]


def test_bfloat16_and_old_weight_files_are_read(tmp_path: Path) -> None:
    half = torch.tensor([[0.0, 1.0]]).repeat(8, 4)
    modern = folder(tmp_path / "modern", w=half.to(torch.bfloat16))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    torch.save({"w": half}, tmp_path / "old" / "pytorch_model.bin")
    assert read_sparsity(modern).share == read_sparsity(str(tmp_path / "old")).share == 0.5


def test_a_sample_reads_some_of_the_matrices(tmp_path: Path) -> None:
    many = {f"w{number:02}": checker(16) for number in range(20)}
    assert len(read_sparsity(folder(tmp_path / "m", **many), sample_bytes=3 * 64 * 64 * 4).matrices) == 3


def test_lost_zeros_are_counted_place_by_place(tmp_path: Path) -> None:
    before = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).repeat(4, 1)
    moved = before.roll(1, dims=1)  # as many zeros, at other places
    first = folder(tmp_path / "first", w=before)
    assert num_lost(first, folder(tmp_path / "kept", w=before * 2)) == 0
    assert num_lost(first, folder(tmp_path / "moved", w=moved)) == 8


@pytest.mark.parametrize(
    ("after", "words"),
    [({"v": torch.ones(4, 4)}, "has no w"), ({"w": torch.ones(2, 4)}, r"is \(4, 4\) in .* and \(2, 4\)")],
)
def test_another_model_is_refused(after: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    first = folder(tmp_path / "first", w=torch.zeros(4, 4))
    with pytest.raises(UserError, match=words):
        num_lost(first, folder(tmp_path / "other", **after))


def test_what_is_no_folder_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a local folder"):
        read_sparsity("meta-llama/Llama-2-7b")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight files"):
        read_sparsity(str(tmp_path))


def test_numbers_for_each_channel_are_no_pruned_matrix(tmp_path: Path) -> None:
    """A state-space model's `A_log` is the logarithm of 1, 2, ... at first: a column of zeros."""
    log = torch.log(torch.arange(1, 9)).repeat(16, 1)
    name = folder(tmp_path / "m", mixer__A_log=log, mixer__in_proj__weight=torch.ones(8, 8))
    assert read_sparsity(name).pruned == ()
    half = torch.tensor([[0.0, 1.0]]).repeat(4, 8, 4)
    name = folder(tmp_path / "e", mlp__experts__gate_up_proj=half)
    assert [item.name for item in read_sparsity(name).pruned] == ["mlp.experts.gate_up_proj"]
