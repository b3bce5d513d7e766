"""How wide the tiles are on which trl's chunked head works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def head_tiles(model: Any, *, on_cpu: bool) -> Iterator[None]:
    """Within the block, make the tiles of trl's head no wider than the vocabulary where that matters.

    trl allocates tiles of up to 4,096 tokens x 32,768 entries whatever the vocabulary is: half a GiB in fp32.
    Of a smaller vocabulary's tile most is never touched.  On CUDA that is allocated all the same; on the CPU
    it is not resident, but the limit that a trial runs under (RLIMIT_DATA) counts what is mapped.  Results
    are the same: one tile holds the whole vocabulary either way.
    """
    from trl.trainer import utils

    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    if on_cpu:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, model.get_output_embeddings().weight.shape[0])
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = width
