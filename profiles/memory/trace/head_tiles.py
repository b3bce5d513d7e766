"""Limit what trl's chunked head computes on a CPU: the width of its tiles, and which positions it scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from autosft.profiles.memory.host_kernels import padded_size
from autosft.profiles.memory.trace.one_pass_head import OnePassHead, has_one_pass


@contextlib.contextmanager
def head_tiles(
    model: Any, *, on_cpu: bool, in_few_sizes: bool = False, in_one_pass: bool = False
) -> Iterator[None]:
    """Within the block, make the head's tiles no wider than the vocabulary and score labels only, on CPUs.

    Off CUDA trl scores every position, so that compiled shapes stay the same from batch to batch; nothing is
    compiled here.  Prompts and padding then cost as much as what is learned.

    trl allocates tiles of up to 4,096 tokens x 32,768 entries whatever the vocabulary: half a GiB in fp32.
    With a smaller vocabulary most of a tile is never touched.  On CUDA it is allocated all the same; on the
    CPU it is not resident, but counts against the limit that a trial runs under (RLIMIT_DATA).  Results do
    not change, up to the rounding of products over fewer rows: one tile holds the whole vocabulary anyway.

    `in_few_sizes`: the scored positions are padded to one of few numbers (`profiles.memory.host_kernels`).
    `in_one_pass`: gradients are made with the logits, where the head allows it (`one_pass_head`).
    """
    from trl.trainer import utils

    width, has_kernel = utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton
    function = utils._ChunkedLogProbFunction
    if on_cpu:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, model.get_output_embeddings().weight.shape[0])
        utils._use_triton = _scores_labels  # in this module it decides which positions are scored, no more
        utils._ChunkedLogProbFunction = _CpuHead(function, in_few_sizes=in_few_sizes, in_one_pass=in_one_pass)
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton = width, has_kernel
        utils._ChunkedLogProbFunction = function


class _CpuHead:
    """What `trl.trainer.utils` calls instead of its function of a chunked head."""

    def __init__(self, function: Any, *, in_few_sizes: bool, in_one_pass: bool) -> None:
        self._function, self._in_few_sizes, self._in_one_pass = function, in_few_sizes, in_one_pass

    def apply(self, hidden: Any, weight: Any, bias: Any, targets: Any, *others: Any) -> tuple[Any, ...]:
        """Return log-probabilities, entropy, log_sum_sq_probs, mean_logits and is_top1, as asked for.

        `others`, as trl passes them: temperature, width of tiles, soft cap, scale, outputs.
        """
        temperature, _, softcap, scale, outputs = others
        is_plain = self._in_one_pass and has_one_pass(
            hidden, weight, bias, temperature=temperature, softcap=softcap, outputs=outputs
        )
        if is_plain:
            log_probs, entropy, is_top1 = OnePassHead.apply(hidden, weight, targets, scale)  # type: ignore[no-untyped-call]
            return (
                log_probs,
                entropy if "entropy" in outputs else None,
                None,
                None,
                is_top1 if "is_top1" in outputs else None,
            )
        if not self._in_few_sizes:
            return self._function.apply(hidden, weight, bias, targets, *others)  # type: ignore[no-any-return]
        from torch.nn.functional import pad

        # The results of the padded positions are dropped, so that their gradients are zero.
        number = len(targets)
        more = padded_size(max(1, number)) - number
        hidden, targets = pad(hidden, (0, 0, 0, more)), pad(targets, (0, more))
        results = self._function.apply(hidden, weight, bias, targets, *others)
        return tuple(None if result is None else result[:number] for result in results)


def _scores_labels(_: Any) -> bool:
    return True
