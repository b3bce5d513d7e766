from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.profiles.memory.allocator import trial_settings
from autosft.profiles.memory.allocator.caching_allocator import (
    Block,
    CachingAllocator,
    OutOfMemory,
    rounded_bytes,
    segment_bytes,
)
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.memory.allocator.replay import smallest_cap

MIB = 1 << 20


@dataclass(frozen=True)
class SizeCase:
    name: str
    requested: int
    block: int
    segment: int


SIZES = [
    SizeCase("one byte", 1, 512, 2 * MIB),
    SizeCase("just over a block", 513, 1024, 2 * MIB),
    SizeCase("largest small", MIB, MIB, 2 * MIB),
    SizeCase("smallest large", MIB + 1, MIB + 512, 20 * MIB),
    SizeCase("just under 10 MiB", 10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
    SizeCase("10 MiB has a segment of its own", 10 * MIB, 10 * MIB, 10 * MIB),
    SizeCase("rounded to 2 MiB", 21 * MIB, 21 * MIB, 22 * MIB),
]


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_sizes(case: SizeCase) -> None:
    assert rounded_bytes(case.requested) == case.block
    assert segment_bytes(case.block) == case.segment
    allocator = CachingAllocator()
    allocator.malloc(case.requested)
    assert allocator.reserved_bytes == case.segment


def test_large_blocks_keep_a_remainder_of_up_to_one_mib() -> None:
    allocator = CachingAllocator()
    allocator.malloc(21 * MIB)  # segment of 22 MiB
    assert allocator.allocated_bytes == 22 * MIB
    allocator.malloc(2 * MIB)
    assert allocator.allocated_bytes == 24 * MIB
    assert allocator.reserved_bytes == 42 * MIB


def test_best_fit_and_merging() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]  # fills one segment of 20 MiB
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    allocator.free(blocks[3])  # merged with the one before: 8 MiB free
    allocator.malloc(4 * MIB)
    allocator.malloc(8 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_cap_gives_cached_segments_back_and_tries_again() -> None:
    allocator = CachingAllocator(cap_bytes=60 * MIB)
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(50 * MIB)
    assert allocator.num_retries == 1
    assert allocator.reserved_bytes == 50 * MIB
    with pytest.raises(OutOfMemory):
        allocator.malloc(12 * MIB)


def test_a_split_segment_cannot_be_given_back_but_an_expandable_one_can() -> None:
    native, expandable = (
        AllocatorOptions(expandable_segments=on).allocator(cap_bytes=100 * MIB) for on in (False, True)
    )
    for allocator in (native, expandable):
        first = allocator.malloc(80 * MIB)
        allocator.free(first)
        allocator.malloc(20 * MIB)  # splits the 80 MiB
    with pytest.raises(OutOfMemory):
        native.malloc(70 * MIB)
    expandable.malloc(70 * MIB)


def test_max_split_size_keeps_large_blocks_whole() -> None:
    allocator = CachingAllocator(max_split_size_bytes=32 * MIB)
    allocator.free(allocator.malloc(64 * MIB))
    allocator.malloc(20 * MIB)  # must not split the 64 MiB
    assert allocator.reserved_bytes == 84 * MIB
    allocator.malloc(64 * MIB)
    assert allocator.reserved_bytes == 84 * MIB


ENVIRONMENTS = [
    ("nothing set", {}, AllocatorOptions()),
    ("split size", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"},
     AllocatorOptions(max_split_size_bytes=128 * MIB)),
    ("newer name wins", {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "x:1"},
     AllocatorOptions(expandable_segments=True)),
    ("two at once", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True, max_split_size_mb:64"},
     AllocatorOptions(expandable_segments=True, max_split_size_bytes=64 * MIB)),
    ("said to be native", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, AllocatorOptions()),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "expected"), [environment[1:] for environment in ENVIRONMENTS],
                         ids=[environment[0] for environment in ENVIRONMENTS])  # fmt: skip
def test_the_environment_is_read(environment: dict[str, str], expected: AllocatorOptions) -> None:
    assert AllocatorOptions.from_environment(environment) == expected


def test_what_a_trial_is_given_is_what_is_simulated() -> None:
    given = {"PYTORCH_ALLOC_CONF": trial_settings.SETTINGS}
    assert AllocatorOptions.from_environment(given) == AllocatorOptions(expandable_segments=True)
    assert trial_settings.options_of_trials(given) == AllocatorOptions(expandable_segments=True)


@pytest.mark.parametrize(
    "setting",
    ["garbage_collection_threshold:0.8", "roundup_power2_divisions:[256:1]", "backend:cudaMallocAsync",
     "max_split_size_mb:many"],
)  # fmt: skip
def test_settings_that_are_not_simulated_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition(":")[0]):
        AllocatorOptions.from_environment({"PYTORCH_CUDA_ALLOC_CONF": setting})


# A script is a list of requests (bytes) and frees (index of a live block).
SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), st.integers(1, 64 * MIB)),
        st.tuples(st.just("malloc"), st.integers(1, 3 * MIB)),
        st.tuples(st.just("free"), st.integers(0, 50)),
        st.tuples(st.just("empty"), st.just(0)),
    ),
    max_size=60,
)
OPTIONS = st.builds(
    AllocatorOptions,
    max_split_size_bytes=st.sampled_from([None, 24 * MIB]),
    expandable_segments=st.booleans(),
)


def run(script: list[tuple[str, int]], allocator: CachingAllocator) -> list[Block]:
    live: list[Block] = []
    for action, value in script:
        if action == "malloc":
            live.append(allocator.malloc(value))
        elif action == "free" and live:
            allocator.free(live.pop(value % len(live)))
        elif action == "empty":
            allocator.empty_cache()
    return live


@given(SCRIPTS, OPTIONS)
@settings(max_examples=200, deadline=None)
def test_live_blocks_never_overlap_and_counts_agree(
    script: list[tuple[str, int]], options: AllocatorOptions
) -> None:
    allocator = options.allocator()
    live = run(script, allocator)
    spans = sorted((block.address, block.address + block.size) for block in live)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert allocator.allocated_bytes == sum(end - start for start, end in spans)
    assert allocator.reserved_bytes >= allocator.allocated_bytes
    assert allocator.peak_reserved_bytes >= allocator.peak_allocated_bytes >= allocator.allocated_bytes
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == 0


@given(SCRIPTS, OPTIONS)
@settings(max_examples=100, deadline=None)
def test_need_lies_between_the_peaks_of_allocated_and_reserved(
    script: list[tuple[str, int]], options: AllocatorOptions
) -> None:
    uncapped = options.allocator()
    run(script, uncapped)

    def succeeds(cap_bytes: int) -> bool:
        try:
            run(script, options.allocator(cap_bytes))
        except OutOfMemory:
            return False
        return True

    def grow(cap_bytes: int) -> int:
        growing = options.allocator(cap_bytes, cap_grows=True)
        run(script, growing)
        return growing.cap_bytes

    # A new segment of the rounded size has to fit under the cap even where expandable pages would not.
    high = uncapped.peak_reserved_bytes + 20 * MIB
    need = smallest_cap(
        succeeds, grow, low_bytes=uncapped.peak_allocated_bytes, high_bytes=high, tolerance_bytes=MIB
    )
    assert uncapped.peak_allocated_bytes <= need <= high
    assert succeeds(need)
