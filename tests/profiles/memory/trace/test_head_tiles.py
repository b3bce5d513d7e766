"""On the CPU the head's tiles are as wide as the vocabulary, and the result is the same."""

from __future__ import annotations

from pathlib import Path

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
