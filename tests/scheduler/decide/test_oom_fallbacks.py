"""The way down from out of memory: its order, and what needs consent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autosft.scheduler.decide.oom_fallbacks import SHORTEST_SEQ_LEN, SMALLEST_BATCH, steps_down
from tests.workers.small import settings


def words(*, allow_degrade: bool, has_bitsandbytes: bool = False, **changes: object) -> list[str]:
    start = settings(**{"seq_len": 1024, "effective_batch_size": 64, **changes})
    return [
        item.description
        for item in steps_down(start, has_bitsandbytes=has_bitsandbytes, allow_degrade=allow_degrade)
    ]


def test_without_consent_the_experiment_stays() -> None:
    assert words(allow_degrade=False) == []
    assert words(allow_degrade=False, has_bitsandbytes=True) == ["optimizer paged_adamw_32bit"]


def test_the_guides_order() -> None:
    assert words(allow_degrade=True)[:5] == [
        "length 768 instead of 1024",
        "length 512 instead of 768",
        "length 384 instead of 512",
        "length 256 instead of 384",
        "effective batch 48 instead of 64",
    ]
    assert words(allow_degrade=True, has_bitsandbytes=True)[-1] == "optimizer paged_adamw_8bit"


def test_nothing_is_left_below_the_smallest() -> None:
    assert words(allow_degrade=True, seq_len=SHORTEST_SEQ_LEN, effective_batch_size=SMALLEST_BATCH) == []


@given(
    seq_len=st.integers(2, 8192),
    batch=st.integers(1, 512),
    has_bitsandbytes=st.booleans(),
    consent=st.booleans(),
)
def test_every_step_asks_for_less_and_says_whether_it_changes_the_experiment(
    seq_len: int, batch: int, has_bitsandbytes: bool, consent: bool
) -> None:
    before = settings(seq_len=seq_len, effective_batch_size=batch)
    for step in steps_down(before, has_bitsandbytes=has_bitsandbytes, allow_degrade=consent):
        after = step.settings
        assert after.seq_len <= before.seq_len
        assert after.effective_batch_size <= before.effective_batch_size
        assert after != before
        assert consent or not step.changes_experiment
        is_same = (after.seq_len, after.effective_batch_size) == (before.seq_len, before.effective_batch_size)
        assert step.changes_experiment or is_same
        before = after
