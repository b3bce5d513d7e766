from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosft.profiles.memory.allocator import replay as module
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.memory.allocator.replay import STREAM_SHIFT, replay, replay_in_python
from autosft.profiles.memory.program.run import not_dominated

MIB = 1 << 20
SIZES = st.one_of(
    st.integers(1, 3 * MIB), st.integers(1, 64 * MIB), st.sampled_from([9 * MIB, 10 * MIB, 24 * MIB])
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Births and deaths, as the events of a run have them."""
    sizes: list[int] = []
    events: list[int] = []
    live: list[int] = []
    for _ in range(draw(st.integers(1, 80))):
        if live and draw(st.booleans()):
            events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
        else:
            live.append(len(sizes))
            events.append(len(sizes))
            stream = draw(st.sampled_from([0, 0, 0, 1, 2]))
            sizes.append(draw(SIZES) + (stream << STREAM_SHIFT))
    return np.array(events, np.int32), np.array(sizes, np.int64)


@pytest.mark.skipif(module._library() is None, reason="there is no C compiler")
@given(
    requests(),
    st.builds(
        AllocatorOptions,
        max_split_size_bytes=st.sampled_from([None, 24 * MIB]),
        expandable_segments=st.booleans(),
    ),
    st.one_of(st.none(), st.integers(20 * MIB, 900 * MIB)),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_c_and_python_agree(
    asked: tuple[np.ndarray, np.ndarray], options: AllocatorOptions, cap: int | None, grows: bool
) -> None:
    events, sizes = asked
    assert replay(events, sizes, options, cap_bytes=cap, cap_grows=grows) == replay_in_python(
        events, sizes, options, cap_bytes=cap, cap_grows=grows
    )


@pytest.mark.parametrize("cap", [None, 50 * MIB])
def test_a_stream_does_not_reuse_what_another_one_has_freed(cap: int | None) -> None:
    events = np.array([0, ~0, 1], np.int32)
    same = np.array([40 * MIB, 30 * MIB], np.int64)
    other = same + np.array([0, 1 << STREAM_SHIFT])
    for run in (replay, replay_in_python):
        assert run(events, same, AllocatorOptions(), cap_bytes=cap).reserved_bytes == 40 * MIB
        got = run(events, other, AllocatorOptions(), cap_bytes=cap)
        assert got.succeeded  # at its cap, the first one's is given back
        assert (got.reserved_bytes, got.num_retries) == ((70 * MIB, 0) if cap is None else (40 * MIB, 1))
        assert got.allocated_bytes == 40 * MIB


def test_without_a_compiler_python_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    events, sizes = np.array([0, 1, ~0, 2], np.int32), np.array([40 * MIB, 20 * MIB, 30 * MIB], np.int64)
    expected = replay_in_python(events, sizes, AllocatorOptions(), cap_bytes=100 * MIB)
    monkeypatch.setattr(module, "_library", lambda: None)
    assert replay(events, sizes, AllocatorOptions(), cap_bytes=100 * MIB) == expected
    assert expected.succeeded
    assert (expected.allocated_bytes, expected.reserved_bytes) == (60 * MIB, 60 * MIB)


def test_not_compiled_is_no_failure(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPILERS", ("no-such-compiler",))
    assert not module._compile(b"int x;", tmp_path / "x.so")
    monkeypatch.undo()
    assert not module._compile(b"not C", tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=40))
def test_every_row_is_below_one_that_is_kept(rows: list[list[int]]) -> None:
    counts = np.array(rows, np.int32)
    kept = counts[not_dominated(counts)]
    assert all((row <= kept).all(axis=1).any() for row in counts)
