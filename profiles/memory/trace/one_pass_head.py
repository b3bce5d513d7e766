"""The output head and its loss on a CPU in one pass: the gradients are made while the logits are there.

trl's head computes the logits again in its backward pass, and folds each tile by some forty operators, 170
bytes of memory traffic a logit.  The loss is linear in the log-probabilities, so that their gradients are
known up to a factor when the logits are: with p the probabilities of a position and t its target,

    d log p_t / d hidden = W_t - p W,        d (sum of log p_t) / d W = (onehot(t) - p)' hidden

(as Liger's fused cross-entropy does).  That leaves two products instead of three with a frozen head, three
instead of four with a trained one, and some fifty bytes a logit; two tiles are held instead of four or more.
"""

from __future__ import annotations

from typing import Any

import torch

from autosft.profiles.memory.program.program import HEAD_CHUNK_TOKENS, ONE_PASS_VOCABULARY

TOKENS = HEAD_CHUNK_TOKENS  # of a tile, as in trl's


class OnePassHead(torch.autograd.Function):
    """Log-probability of each target, entropy, and whether the target is the likeliest; all fp32.

    hidden (N, H), weight (V, H), targets (N,); logits are hidden @ weight.T times `scale`.  Each of the three
    results is (N,); only the first has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        num = len(hidden)
        log_probs, entropy = hidden.new_empty(num), hidden.new_empty(num)
        is_top1 = torch.empty(num, dtype=torch.bool, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        rows = min(num, TOKENS)
        logits_buffer, exp_buffer = (hidden.new_empty((rows, len(weight))) for _ in range(2))
        for start in range(0, num, TOKENS):
            part = slice(start, start + TOKENS)
            inputs, target = hidden[part], targets[part]
            logits, exp = logits_buffer[: len(inputs)], exp_buffer[: len(inputs)]
            torch.mm(inputs, weight.t(), out=logits)
            if scale != 1.0:
                logits.mul_(scale)
            top = logits.argmax(-1)
            is_top1[part] = top == target
            logits.sub_(logits.gather(-1, top.unsqueeze(-1)))
            torch.exp(logits, out=exp)
            total = exp.sum(-1)
            log_total = total.log()
            log_probs[part] = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - log_total
            weighted = torch.bmm(exp.unsqueeze(1), logits.unsqueeze(2)).view(-1)
            entropy[part] = log_total - weighted / total
            if of_hidden is None and of_weight is None:
                continue
            # The logits' gradient: onehot - p.
            exp.div_(total.neg_().unsqueeze(-1))
            exp.scatter_add_(-1, target.unsqueeze(-1), torch.ones_like(total).unsqueeze(-1))
            if of_hidden is not None:
                torch.mm(exp, weight, out=of_hidden[part])
            if of_weight is not None:
                of_weight.addmm_(exp.t(), inputs)
        for gradient in (of_hidden, of_weight):
            if gradient is not None and scale != 1.0:
                gradient.mul_(scale)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.gradients, ctx.scale = (of_hidden, of_weight), scale
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients are made once: backward cannot run over it again")
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        if of_hidden is not None:
            of_hidden.mul_(given.unsqueeze(-1))
        if of_weight is not None and (given.is_meta or bool((given == given[:1]).all())):
            of_weight.mul_(given[:1].sum())
        elif of_weight is not None:  # a loss of a user's trainer that weighs positions
            of_weight = _weighed(hidden, weight, targets, given, scale=ctx.scale)
        return of_hidden, of_weight, None, None


def _weighed(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, given: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Return the weight's gradient where the log-probabilities have gradients of their own."""
    gradient = torch.zeros_like(weight)
    for part in (slice(start, start + TOKENS) for start in range(0, len(hidden), TOKENS)):
        of_logits = hidden[part].mm(weight.t()).mul_(scale).softmax(-1).neg_()
        of_logits.scatter_add_(-1, targets[part].unsqueeze(-1), of_logits.new_ones((len(of_logits), 1)))
        gradient.addmm_(of_logits.mul_(given[part].unsqueeze(-1)).t(), hidden[part])
    return gradient.mul_(scale)


def has_one_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    outputs: tuple[str, ...],
) -> bool:
    """Whether a head can be computed so: plain fp32 logits over a vocabulary of which two tiles are small."""
    is_plain = bias is None and softcap is None and temperature == 1.0
    is_fp32 = hidden.dtype == weight.dtype == torch.float32
    return is_plain and is_fp32 and len(weight) <= ONE_PASS_VOCABULARY and {*outputs} <= _OUTPUTS


_OUTPUTS = frozenset({"log_probs", "entropy", "is_top1"})
