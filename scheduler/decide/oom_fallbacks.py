"""Changes of a trial's settings that are tried once no plan fits them.  Pure.

Planning comes first and changes nothing that is learned: fewer rows in a micro batch, activation
checkpointing, sharding over more devices.  Once no plan is left, the changes below are tried in order.  A
paged optimizer computes the same update from host memory.  All others change the experiment and require the
user's consent (`--allow-degrade`); guide 1's are length 1024 -> 768 -> 512 and effective batch 64 -> 48 ->
32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autosft.studies.search.settings import SETTINGS
from autosft.studies.trial import TrainingSettings

#: Optimizers with a variant whose state is in host memory, and that variant (transformers' names).
PAGED = {"adamw_torch": "paged_adamw_32bit", "adamw_torch_fused": "paged_adamw_32bit"}
#: The same with 8-bit state.
EIGHT_BIT = {**dict.fromkeys(PAGED, "adamw_bnb_8bit"), "paged_adamw_32bit": "paged_adamw_8bit"}
SHORTEST_SEQ_LEN = 256
SMALLEST_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A change of a trial's settings that needs less memory."""

    settings: TrainingSettings
    description: str  # "length 768 instead of 1024"
    changes_experiment: bool


def steps_down(settings: TrainingSettings, *, has_bitsandbytes: bool, allow_degrade: bool) -> Iterator[Step]:
    """Yield changes of `settings` that need less memory, mildest first; each includes the ones before it.

    `has_bitsandbytes`: paged and 8-bit optimizers are available, on a GPU with that library.  Lengths stop at
    SHORTEST_SEQ_LEN and batches at SMALLEST_BATCH.  A smaller effective batch saves nothing if the micro
    batch is already 1; callers skip a change that still has no plan.  What is evaluated never changes, so
    that scores stay comparable.
    """
    if has_bitsandbytes and settings.optimizer in PAGED:
        settings = replace(settings, optimizer=PAGED[settings.optimizer])
        yield Step(settings=settings, description=f"optimizer {settings.optimizer}", changes_experiment=False)
    if not allow_degrade:
        return
    for seq_len in shorter(settings.seq_len):
        text = f"length {seq_len} instead of {settings.seq_len}"
        settings = replace(settings, seq_len=seq_len)
        yield Step(settings=settings, description=text, changes_experiment=True)
    for batch in smaller(settings.effective_batch_size):
        text = f"effective batch {batch} instead of {settings.effective_batch_size}"
        settings = replace(settings, effective_batch_size=batch)
        yield Step(settings=settings, description=text, changes_experiment=True)
    if has_bitsandbytes and settings.optimizer in EIGHT_BIT:
        settings = replace(settings, optimizer=EIGHT_BIT[settings.optimizer])
        yield Step(settings=settings, description=f"optimizer {settings.optimizer}", changes_experiment=True)


def shorter(seq_len: int) -> list[int]:
    """Return 3/4 and 1/2 of each power of two at or below a length: 1024 -> 768, 512, 384, 256."""
    lengths = {share * (1 << k) // 4 for k in range(31) for share in (3, 4)}
    return sorted((length for length in lengths if SHORTEST_SEQ_LEN <= length < seq_len), reverse=True)


def smaller(batch: int) -> list[int]:
    """Return 3/4 and 1/2 of each power of two at or below a batch: 64 -> 48, 32, 24, 16, 12, 8."""
    sizes = {share * (1 << k) // 4 for k in range(2, 31) for share in (3, 4)}
    return sorted((size for size in sizes if SMALLEST_BATCH <= size < batch), reverse=True)


def describe_changes(before: TrainingSettings, after: TrainingSettings) -> str:
    """Describe the differences between two settings of a trial."""
    return ", ".join(
        f"{setting.noun} {getattr(after, name)} instead of {getattr(before, name)}"
        for name, setting in SETTINGS.items()
        if hasattr(after, name) and getattr(after, name) != getattr(before, name)
    )
