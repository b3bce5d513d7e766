"""On the CPU the head's tiles are as wide as the vocabulary, and the result is the same."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from autosft.profiles.memory.trace.head_tiles import head_tiles
from tests.cli.chat_model import make_chat_model


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_small_vocabulary_has_narrow_tiles_on_the_cpu(tmp_path: Path, on_cpu: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    class Widest(TorchDispatchMode):
        """Notes the most columns of any tensor that an operator returns."""

        columns = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim:
                self.columns = max(self.columns, out.shape[-1])
            return out

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_chat_model(tmp_path))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, model.config.vocab_size, (2, 16))
    plain = model(input_ids=ids, labels=ids, fused_lm_head=True)
    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with head_tiles(model, on_cpu=on_cpu), Widest() as seen:
        narrow = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert width == utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert (seen.columns >= width) is not on_cpu
    assert torch.equal(narrow.log_probs, plain.log_probs)


def test_on_the_cpu_only_labels_are_scored_and_the_loss_is_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_chat_model(tmp_path))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, model.config.vocab_size, (3, 40))
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    rows: list[int] = []

    def counted(hidden: torch.Tensor, *rest: object) -> object:
        rows.append(len(hidden))
        return apply(hidden, *rest)

    apply = utils._ChunkedLogProbFunction.apply
    results = []
    for on_cpu in (False, True):
        model.zero_grad()
        with (
            head_tiles(model, on_cpu=on_cpu),
            mock.patch.object(utils._ChunkedLogProbFunction, "apply", counted),
        ):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
        gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        results.append((out, gradients))
    (every, its_gradients), (labelled, gradients) = results
    assert rows == [3 * 39, int((labels[:, 1:] != -100).sum())]
    assert float(labelled.loss) == pytest.approx(float(every.loss), rel=2e-6)
    torch.testing.assert_close(labelled.log_probs, every.log_probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(labelled.is_top1, every.is_top1)
    for one, other in zip(gradients, its_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_labels", [0, 1, 64, 70])
def test_scored_positions_are_padded_to_few_sizes_and_the_loss_is_the_same(
    num_labels: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_chat_model(tmp_path))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, model.config.vocab_size, (2, 60))
    labels = torch.full_like(ids, -100)
    labels.view(-1)[1 : num_labels + 1] = ids.view(-1)[1 : num_labels + 1]
    labels[:, 0] = -100  # never predicted
    function, rows, results = utils._ChunkedLogProbFunction, [], []

    def counted(hidden: torch.Tensor, *rest: object) -> object:
        rows.append(len(hidden))
        return apply(hidden, *rest)

    apply = function.apply
    for in_few_sizes in (False, True):
        model.zero_grad()
        with (
            head_tiles(model, on_cpu=True, in_few_sizes=in_few_sizes),
            mock.patch.object(function, "apply", counted),
        ):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
        results.append((out, [one.grad.clone() for one in model.parameters() if one.grad is not None]))
    assert utils._ChunkedLogProbFunction is function
    assert rows[0] == int((labels[:, 1:] != -100).sum())
    assert rows[1] == max(64, -(-rows[0] // 64) * 64)
    (plain, its_gradients), (padded, gradients) = results
    assert float(padded.loss) == pytest.approx(float(plain.loss), rel=2e-6)
    torch.testing.assert_close(padded.log_probs, plain.log_probs, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, its_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
