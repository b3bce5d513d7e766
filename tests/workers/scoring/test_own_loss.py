"""A model whose own code changes its logits is not trained as another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from autosft.profiles.errors import UserError
from autosft.profiles.model.model_class import build, config_of
from autosft.workers.scoring.own_loss import require_own_loss
from benchmarks.families import FAMILIES, Family


def small() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )


class Scaled(LlamaForCausalLM):
    """Scales its logits in code of its own, by nothing that its configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("made", [LlamaForCausalLM, Scaled])
def test_logits_that_are_changed_are_found(made: Any, is_adapted: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = made(small()).to(dtype).train()
    for parameter in model.parameters():
        parameter.data *= 5
    add_fused_lm_head(model, outputs=("log_probs",))
    asked = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if is_adapted else model
    if made is Scaled:
        with pytest.raises(UserError, match="trained and scored as another model"):
            require_own_loss(asked, "--model x")
    else:
        require_own_loss(asked, "--model x")
    assert asked.training


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_all_families_are_scored_as_what_they_are(family: Family) -> None:
    torch.manual_seed(0)
    model = build(config_of(family.config_json), attn_implementation=family.attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger logits, which a cap would change
            parameter.data *= 3
    add_fused_lm_head(model, outputs=("log_probs",))
    require_own_loss(model, family.name)
