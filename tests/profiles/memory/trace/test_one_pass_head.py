"""The head in one pass: what trl's chunked head gives, for less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from autosft.profiles.memory.program.program import ONE_PASS_VOCABULARY
from autosft.profiles.memory.trace import one_pass_head
from autosft.profiles.memory.trace.head_tiles import head_tiles
from autosft.profiles.memory.trace.one_pass_head import OnePassHead, has_one_pass
from tests.cli.chat_model import make_chat_model

OUTPUTS = ("log_probs", "entropy", "is_top1")


def given(num: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(num)
    hidden, weight = torch.randn(num, 16).requires_grad_(), torch.randn(101, 16).requires_grad_()
    return hidden, weight, torch.randint(0, 101, (num,))


def by_trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float) -> Any:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, len(weight), None, scale, OUTPUTS)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("num", [1, 37, 130])
@pytest.mark.parametrize("weighs", [False, True], ids=["a mean", "weights of positions"])
@pytest.mark.parametrize("trains_head", [False, True])
def test_results_and_gradients_are_trl_s(
    num: int, scale: float, weighs: bool, trains_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass_head, "TOKENS", 64)  # several tiles
    hidden, weight, targets = given(num)
    weight.requires_grad_(trains_head)
    factors = torch.rand(num) if weighs else torch.full((num,), 0.125)
    results, gradients = [], []
    for head in (OnePassHead.apply, by_trl):
        hidden.grad = weight.grad = None
        log_probs, entropy, *_, is_top1 = head(hidden, weight, targets, scale)
        (log_probs * factors).sum().backward()
        results.append((log_probs, entropy, is_top1))
        gradients.append([one.grad for one in (hidden, weight) if one.grad is not None])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == 1 + trains_head
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    weight = torch.ones(4, 2)
    _, _, is_top1 = OnePassHead.apply(torch.ones(4, 2), weight, torch.arange(4), 1.0)
    assert is_top1.tolist() == [True, False, False, False]


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    hidden, weight, targets = given()
    loss = OnePassHead.apply(hidden, weight, targets, 1.0)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run over it again"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"bias": torch.zeros(101)}, False),
        ({"softcap": 30.0}, False),
        ({"temperature": 0.7}, False),
        ({"outputs": ("log_probs", "mean_logits")}, False),
        ({"hidden": torch.zeros(3, 16, dtype=torch.bfloat16)}, False),
        ({"weight": torch.empty(ONE_PASS_VOCABULARY + 1, 16, device="meta")}, False),
    ],
    ids=["plain", "bias", "softcap", "temperature", "other outputs", "bf16", "a large vocabulary"],
)
def test_other_heads_are_left_to_trl(changes: dict[str, Any], expected: bool) -> None:
    hidden, weight, _ = given()
    values: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": None, "temperature": 1.0}
    values |= {"softcap": None, "outputs": OUTPUTS, **changes}
    found = has_one_pass(values.pop("hidden"), values.pop("weight"), values.pop("bias"), **values)
    assert found is expected


def test_a_model_trains_the_same_with_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_chat_model(tmp_path))
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    ids = torch.randint(0, model.config.vocab_size, (3, 40))
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    results = []
    for in_one_pass in (False, True):
        model.zero_grad()
        with (
            head_tiles(model, on_cpu=True, in_one_pass=in_one_pass),
            mock.patch.object(OnePassHead, "apply", side_effect=OnePassHead.apply) as used,
        ):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        assert used.called is in_one_pass
        out.loss.backward()
        results.append((out, [one.grad.clone() for one in model.parameters() if one.grad is not None]))
    (plain, its_gradients), (once, gradients) = results
    assert float(once.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=2e-6)
    torch.testing.assert_close(once.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(once.is_top1, plain.is_top1)
    for one, other in zip(gradients, its_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_labels_the_loss_is_zero_and_goes_backward(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    model = AutoModelForCausalLM.from_pretrained(make_chat_model(tmp_path))
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    with head_tiles(model, on_cpu=True, in_one_pass=True):
        out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert not model.get_output_embeddings().weight.grad.any()
