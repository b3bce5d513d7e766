"""Sparse fine-tuning: the zeros that a run starts with are its zeros at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.profiles.model.sparsity import num_lost, read_sparsity
from autosft.profiles.recipe import Method
from autosft.studies.trial import AttemptEnd, Measurement
from autosft.workers.tools.merge_adapter import merge
from autosft.workers.training import zero_masks
from autosft.workers.training.train import train
from autosft.workers.training.zero_masks import ZeroMasks, count_not_zero, fill_zero, pack
from tests.workers.small import job, make_data, make_model, settings

pytestmark = pytest.mark.slow

Prune = Callable[[torch.Tensor], torch.Tensor]


def unstructured(weight: torch.Tensor) -> torch.Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    order = torch.rand(weight.reshape(-1, 4).shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return (order < 2).reshape(weight.shape)


def blocks(weight: torch.Tensor) -> torch.Tensor:
    row, column = torch.arange(weight.shape[0]) // 8, torch.arange(weight.shape[1]) // 8
    return (row.unsqueeze(1) + column) % 2 == 0


PATTERNS: dict[str, Prune] = {"unstructured": unstructured, "2:4": two_of_four, "blocks of 8x8": blocks}


def pruned(folder: Path, prune: Prune) -> Path:
    from transformers import AutoModelForCausalLM

    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.masked_fill_(prune(weight), 0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def run(model: Path, data: Path, output: Path, **changes: object) -> tuple[AttemptEnd, list[Measurement]]:
    reports: list[Measurement] = []
    wanted = settings(method=Method.SPARSE, weight_decay=0.1)
    end = train(job(model, data, output, settings=wanted, **changes), reports.append, lambda: None)
    return end, [report for report in reports if report.is_evaluation]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_checkpoint_keeps_every_zero(pattern: str, data: Path, tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", PATTERNS[pattern])
    assert read_sparsity(str(model)).pattern == pattern
    end, reports = run(model, data, tmp_path / "trial")
    assert end.completed
    for report in reports:
        assert report.checkpoint is not None
        assert num_lost(str(model), report.checkpoint) == 0
        assert read_sparsity(report.checkpoint).pattern == pattern
    assert reports[-1].metric("eval_loss") < reports[0].metric("eval_loss")  # type: ignore[operator]


def test_full_fine_tuning_loses_them(data: Path, tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", unstructured)
    reports: list[Measurement] = []
    train(job(model, data, tmp_path / "trial"), reports.append, lambda: None)
    assert reports[-1].checkpoint is not None
    assert num_lost(str(model), reports[-1].checkpoint) > 500


def test_a_lost_zero_ends_the_attempt_before_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZeroMasks, "clear_weights", lambda self: None)
    monkeypatch.setattr(ZeroMasks, "clear_gradients", lambda self: None)
    model = pruned(tmp_path / "model", unstructured)
    with pytest.raises(RuntimeError, match=r"zeros of model.layers.0\S+ were lost in training"):
        run(model, data, tmp_path / "trial")


def test_a_dense_model_has_nothing_to_keep(data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(UserError, match="no weight matrix of the model has 5% zeros"):
        run(model, data, tmp_path / "trial")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_equals_a_dense_run_that_is_masked_by_hand(
    optimizer: type[torch.optim.Optimizer], autocast: bool
) -> None:
    def net() -> torch.nn.Sequential:
        torch.manual_seed(0)
        made = torch.nn.Sequential(
            torch.nn.Embedding(11, 16), torch.nn.Linear(16, 33), torch.nn.ReLU(), torch.nn.Linear(33, 11)
        )
        with torch.no_grad():
            for layer in (made[1], made[3]):
                layer.weight.masked_fill_(unstructured(layer.weight), 0)
        return made

    def steps(model: torch.nn.Module, clear: Callable[[], None], after: Callable[[], None]) -> None:
        optimize = optimizer(model.parameters(), lr=0.05, weight_decay=0.1)  # type: ignore[call-arg]
        torch.manual_seed(1)
        for _ in range(20):
            optimize.zero_grad()
            for _ in range(2):  # accumulated
                ids = torch.randint(0, 11, (8,))
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 11)
                loss.backward()
            clear()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimize.step()
            after()

    ours, reference = net(), net()
    masks = ZeroMasks(ours)
    steps(ours, masks.clear_gradients, masks.clear_weights)
    weights = [layer.weight for layer in (reference[1], reference[3])]
    by_hand = [(weight != 0).float() for weight in weights]

    def clear() -> None:
        for weight, mask in zip(weights, by_hand, strict=True):
            assert weight.grad is not None
            weight.grad *= mask

    def after() -> None:
        with torch.no_grad():
            for weight, mask in zip(weights, by_hand, strict=True):
                weight.mul_(mask)

    steps(reference, clear, after)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)
    masks.check()
    assert masks.num_zeros == sum(int((mask == 0).sum()) for mask in by_hand)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 9),
    chunk=st.sampled_from([8, 16, 1 << 24]),
)
def test_bits_stand_for_the_zeros(shape: tuple[int, ...], seed: int, chunk: int) -> None:
    zero = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_masks, "CHUNK", chunk)
        bits = pack(zero)
        assert bits.numel() == -(-zero.numel() // 8)
        filled = torch.ones(shape)
        fill_zero(filled, bits)
        assert torch.equal(filled == 0, zero)
        turned = torch.ones(shape[::-1]).permute(*range(len(shape))[::-1])  # not contiguous
        fill_zero(turned, bits)
        assert torch.equal(turned == 0, zero)
        assert count_not_zero(torch.ones(shape), bits) == int(zero.sum())
        assert count_not_zero(filled, bits) == 0


def test_an_adapter_is_merged_with_or_without_the_zeros_of_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = str(pruned(tmp_path / "base", unstructured))
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "base").glob("*token*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    for name, keep_zeros in (("dense", False), ("sparse", True)):
        merge(str(tmp_path / "adapter"), str(tmp_path / name), base, keep_zeros=keep_zeros)
    assert num_lost(base, str(tmp_path / "dense")) > 500
    assert num_lost(base, str(tmp_path / "sparse")) == 0
    assert num_lost(str(tmp_path / "sparse"), str(tmp_path / "dense")) == num_lost(
        base, str(tmp_path / "dense")
    )
