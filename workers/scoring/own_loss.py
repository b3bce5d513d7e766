"""Check that trl's fused head, which training and scoring use, gives the model's own log-probabilities.

The head multiplies the backbone's last hidden states by the output head's weight, and applies the
configuration fields that it knows (`final_logit_softcapping`, `logit_scale`, `logits_scaling`, ...).  A model
whose code changes its logits in any other way would silently be trained and scored as a different model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_NUM_TOKENS = 8
#: How much log-probabilities may differ by rounding, relative to the largest logit: in fp32, and in 16 bits.
_TOLERANCE, _TOLERANCE_16 = 1e-3, 3e-2


def require_own_loss(model: PreTrainedModel | PeftModel, source: str) -> None:
    """Raise UserError if a model's fused head does not give the model's own log-probabilities.

    Runs a few tokens through both, without gradients and dropout.  Skips sharded models, models that do not
    return logits for all tokens, and adapters that prepend tokens.
    """
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    config = getattr(model, "active_peft_config", None)
    if any(isinstance(one, DTensor) for one in parameters) or getattr(config, "is_prompt_learning", False):
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = _log_probs(model, _tokens(model))
    except Exception:  # reported when the step runs
        return
    finally:
        model.train(was_training)
    if found is None:
        return
    own, fused, largest = found
    is_exact = all(one.dtype is torch.float32 for one in parameters)
    off = float((own - fused).abs().max())
    if off > (_TOLERANCE if is_exact else _TOLERANCE_16) * max(largest, 1.0):
        raise UserError(
            f"{source}: the log-probabilities of its own forward are not those of its last hidden states "
            f"times its output head (off by {off:.2g}), which trl's loss is computed from: it would be "
            "trained and scored as another model.",
            remedy="Its code changes the logits. What config.json can say instead is followed: "
            "logit_scale, logits_scaling, final_logit_softcapping.",
        )


def _tokens(model: Any) -> torch.Tensor:
    embeddings = model.get_input_embeddings()
    size = int(embeddings.num_embeddings)
    first = torch.arange(_NUM_TOKENS, device=embeddings.weight.device)
    return ((first * 7919 + size // 3) % size).unsqueeze(0)


def _log_probs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Return next-token log-probabilities of the model and of the head, and the largest logit."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if logits.shape[:2] != ids.shape:
        return None
    fused = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs.float()
    own = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return own, fused.reshape(own.shape), float(logits.abs().max())
