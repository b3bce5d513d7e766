"""Sliding-window perplexity: every token once, with its context, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autosft.studies.metrics import METRICS
from autosft.workers.scoring.perplexity import score_tokens, windows
from tests.workers.small import VOCAB_SIZE, make_model


@given(num_tokens=st.integers(2, 200), window=st.integers(2, 40), data=st.data())
def test_each_token_but_the_first_is_scored_once_with_enough_context(
    num_tokens: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for item in windows(num_tokens, window=window, stride=stride):
        assert 0 < item.end - item.start <= window
        assert item.first_scored > item.start, "something to go by"
        context = item.first_scored - item.start
        assert context == item.first_scored or context >= min(window - stride, item.first_scored)
        scored += range(item.first_scored, item.end)
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 0), (1, 1)])
def test_a_stride_that_leaves_no_context_is_refused(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        list(windows(10, window=window, stride=stride))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_equals_the_sum_over_single_tokens(folder: Path, micro_batch: int) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(requires_grad=False)
    ids = torch.randint(2, VOCAB_SIZE, (45,), generator=torch.Generator().manual_seed(0)).tolist()
    window, stride = 12, 5
    expected = 0.0
    for item in windows(len(ids), window=window, stride=stride):
        for position in range(item.first_scored, item.end):
            logits = model(torch.tensor([ids[item.start : position]])).logits[0, -1]
            expected -= float(torch.log_softmax(logits.double(), dim=0)[ids[position]])
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    score = score_tokens(model, ids, window=window, stride=stride, micro_batch=micro_batch)
    assert sum(score.num_tokens) == 44
    assert score.loss == pytest.approx(expected / 44, rel=1e-5)
    interval = METRICS["eval_loss"].interval(score)
    assert interval is not None
    assert 0 < interval.standard_error < 1
    assert interval.num_examples == len(score.num_tokens)  # windows
