"""Liger's losses, followed without its kernels: sizes by hand, and a user's trainer that calls them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autosft.profiles.errors import MissingExtraError
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory import estimate
from autosft.profiles.recipe import MemoryEstimate, Method, Precision
from autosft.profiles.user_code import find
from tests.profiles.memory.models import config_json, device_profile, length_profile, step_recipe

torch = pytest.importorskip("torch")

from autosft.profiles.memory.program.program import Shape  # noqa: E402
from autosft.profiles.memory.trace.liger import chunk_tokens, liger_losses  # noqa: E402 - needs torch
from autosft.profiles.memory.trace.tracing import Loop, Target, trace  # noqa: E402

HIDDEN, VOCABULARY = 64, 4096

SOURCE = """
from liger_kernel.ops import LigerCrossEntropyFunction, LigerFusedLinearCrossEntropyFunction
from trl import SFTTrainer

def logits_in_place(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss, *_ = LigerCrossEntropyFunction.apply(logits, labels[:, 1:].flatten(), None, -100, 0.0, 0.0, "sum")
    return loss / num_items_in_batch

class Fused(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        states = model.model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
        loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
            states, model.lm_head.weight, inputs["labels"][:, 1:].flatten(), None, None, -100, 0.0, 0.0, "sum"
        )
        return loss / num_items_in_batch
"""


class CrossEntropy(torch.autograd.Function):
    """Has the signature of liger-kernel 0.8.5, and like it no way to run here."""

    @staticmethod
    def forward(
        ctx: Any, _input: Any, target: Any, weight: Any, ignore_index: int = -100,
        lse_square_scale: float = 0, label_smoothing: float = 0, reduction: str = "mean",
        softcap: Any = None, return_z_loss: bool = False,
        return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
    ) -> Any:  # fmt: skip
        raise AssertionError("Triton")

    backward = forward


class FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _input: Any, weight: Any, target: Any, bias: Any = None, ce_weight: Any = None,
        ignore_index: int = -100, lse_square_scale: float = 0, label_smoothing: float = 0,
        reduction: str = "mean", softcap: Any = None, return_z_loss: bool = False, accum_dtype: Any = None,
        use_token_scaling: bool = False, return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False, ce_impl: Any = None, ce_mode: Any = None,
        chunk_mem_const: int = 1,
    ) -> Any:  # fmt: skip
        raise AssertionError("Triton")

    backward = forward


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ops = ModuleType("liger_kernel.ops")
    ops.LigerCrossEntropyFunction = CrossEntropy  # type: ignore[attr-defined]
    ops.LigerFusedLinearCrossEntropyFunction = FusedCrossEntropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    own_module(tmp_path, monkeypatch)
    yield
    sys.modules.pop("with_liger", None)


def own_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "with_liger.py").write_text(SOURCE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("with_liger", None)


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "vocabulary", "expected"),
    [
        (4096, 4096, 128_256, 128),  # a 32nd of them
        (4097, 4096, 128_256, 256),  # one more: the next power of two
        (1000, 4096, 32_000, 128),
        (100, 512, 512, 100),  # all at once, and no more than there are
    ],
)
def test_how_many_tokens_have_logits_at_once(
    num_tokens: int, hidden: int, vocabulary: int, expected: int
) -> None:
    assert chunk_tokens(num_tokens, hidden, vocabulary) == expected


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("liger")
def test_the_fused_loss_holds_what_its_source_makes(autocast: bool) -> None:
    num_tokens, chunk = 1000, 16  # of 1000 / (4096 / 64), rounded up to a power of two
    dtype, size = (torch.float32, 4) if autocast else (torch.bfloat16, 2)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype, device="meta")

    def run(recorder: Any, cast: Any, _: Shape) -> None:
        with recorder.segment("step"), cast():
            states = torch.zeros(num_tokens, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
            target = torch.zeros(num_tokens, dtype=torch.long, device="meta")
            loss, *_ = FusedCrossEntropy.apply(states, head.weight, target)
        loss.backward()

    loop = Loop(model=head, layers=[], run=run)
    target = Target(kind=DeviceKind.CUDA, autocast_dtype=torch.bfloat16 if autocast else None)
    traced = trace(loop, Shape(batch=1, seq=num_tokens, scored=num_tokens), padded=False, target=target)
    assert traced.only_at_its_shape
    states, weight = num_tokens * HIDDEN * size, VOCABULARY * HIDDEN * size
    # with their gradients; targets, losses, and which targets count; the logits of one chunk
    expected = 2 * states + 2 * weight + num_tokens * (8 + 4 + 1) + chunk * VOCABULARY * 2
    if autocast:  # products take the head in 16 bits
        expected += VOCABULARY * HIDDEN * 2
    assert traced.peak_bytes() == pytest.approx(expected, abs=4096)


@pytest.mark.usefixtures("liger")
def test_only_while_liger_is_there_and_only_on_cuda_is_it_stood_in_for() -> None:
    original = FusedCrossEntropy.forward
    with liger_losses(DeviceKind.CPU, (8, 0), None):  # type: ignore[arg-type]
        assert FusedCrossEntropy.forward is original
    with liger_losses(DeviceKind.CUDA, (8, 0), None):  # type: ignore[arg-type]
        assert FusedCrossEntropy.forward is not original
    assert FusedCrossEntropy.forward is original


def memory(micro_batch: int, seq_len: int, **own: Any) -> MemoryEstimate:
    config = config_json(vocab_size=32_000, hidden_size=64, intermediate_size=176, head_dim=16)
    recipe = replace(step_recipe(method=Method.FULL, precision=Precision.BF16), **own)
    return estimate(config, recipe, micro_batch, length_profile(seq_len, count=8), device_profile())


@pytest.mark.slow
@pytest.mark.usefixtures("liger")
def test_a_users_trainer_with_ligers_loss_is_followed() -> None:
    fused = {"trainer": find("with_liger:Fused", flag="--trainer")}
    small, large = memory(4, 400, **fused), memory(8, 400, **fused)
    assert small.untraced == large.untraced == ()
    in_place = memory(4, 400, loss=find("with_liger:logits_in_place", flag="--loss"))
    assert in_place.untraced == ()
    logits_bytes = 4 * 399 * 32_000 * 2
    assert in_place.need.median_bytes > logits_bytes
    assert small.need.median_bytes < in_place.need.median_bytes - logits_bytes // 2
    assert large.need.median_bytes > small.need.median_bytes


def test_without_liger_the_part_that_brings_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_module(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingExtraError, match=r"liger_kernel, needs the optional part 'gpu'"):
        find("with_liger:Fused", flag="--trainer")
