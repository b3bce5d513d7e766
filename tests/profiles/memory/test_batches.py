from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.memory.batches import draw_order, draw_row_order, evaluation_batch
from autosft.profiles.recipe import LengthProfile

LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=50)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(1, 5))
def test_every_batch_is_full_and_the_worst_one_has_the_longest_example(
    sizes: list[int], micro_batch: int, seed: int, per_step: int
) -> None:
    profile = LengthProfile(lengths=tuple(sizes), scored=tuple(n // 2 for n in sizes), max_length=300)
    order = draw_order(profile, micro_batch, num_batches=4, seed=seed, per_step=per_step)
    assert order.first
    for batch in (*order.first, order.worst):
        assert batch.shape.batch == micro_batch
        assert batch.shape.seq <= max(profile.longest, 2) + 1
        assert not (batch.padded and micro_batch == 1)
        assert not (batch.padded and batch.shape.seq % 8 == 0)
    assert order.worst.shape.seq >= profile.longest
    assert order == draw_order(profile, micro_batch, num_batches=4, seed=seed, per_step=per_step)
    for step in zip(*[iter(order.first)] * per_step, strict=False):
        seqs = [batch.shape.seq for batch in step]
        assert all(after <= before + 1 for before, after in itertools.pairwise(seqs)), "longest first"


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(1, 5))
def test_a_row_is_as_long_as_its_examples_and_the_worst_is_the_longest(
    sizes: list[int], micro_batch: int, seed: int, per_step: int
) -> None:
    profile = LengthProfile(lengths=tuple(sizes), scored=tuple(n // 2 for n in sizes), max_length=300)
    order = draw_row_order(profile, micro_batch, num_batches=4, seed=seed, per_step=per_step)
    assert order.first
    for batch in (*order.first, order.worst):
        assert batch.shape.is_row
        assert not batch.padded
        assert batch.shape.batch == micro_batch
        assert micro_batch * min(sizes) <= batch.shape.seq <= max(2, micro_batch * max(sizes))
        assert 1 <= batch.shape.scored <= batch.shape.num_predicted
    assert order.worst.shape.seq >= max(batch.shape.seq for batch in order.first)
    if len(sizes) >= micro_batch * per_step:
        assert order.worst.shape.seq >= max(sizes), "each example comes up in every pass, or in the next"


def test_an_evaluation_begins_with_its_longest_examples() -> None:
    lengths = LengthProfile(lengths=(10, 90, 20, 80, 30), scored=(9, 1, 20, 1, 30), max_length=100)
    batch = evaluation_batch(lengths, 2)
    assert (batch.shape.batch, batch.shape.seq, batch.padded) == (2, 90, True)
    assert batch.shape.scored == 50  # of the second batch, 30 and 20
    assert evaluation_batch(lengths, 16).shape.batch == 5
