"""What is likely to be submitted: what came in the last hours comes again in the next ones.  Pure.

A forecast without it is too early by what others submit meanwhile: of two users with equal shares, the one
who has used less goes first, also with what they have not submitted yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autosft.service.decide.situation import HOUR_S
from autosft.service.values import Item, ItemState

#: How far back a queue's submissions are looked at: of a young queue, since its first one.
MIN_PERIOD_S, MAX_PERIOD_S = HOUR_S, 6 * HOUR_S
#: How often they come again, and how many are expected in all.
NUM_PERIODS, MAX_EXPECTED = 2, 300
#: Ids of what is expected: behind all that were ever given.
FIRST_ID = 1 << 40
#: Submissions that say what is to be expected.
MAX_RECENT = 500


def is_expected(item_id: int) -> bool:
    """Whether an item is one that is likely to come, and was not submitted."""
    return item_id >= FIRST_ID


def expected(recent: Iterable[Item], *, since: float, now: float) -> tuple[Item, ...]:
    """Return what is likely to come, the soonest first: items that wait for their time.

    `recent` are the queue's newest items, whatever has become of them, and `since` is when its first one of
    all was submitted.  Each comes again one period after it came, and once more after another.
    """
    period_s = min(MAX_PERIOD_S, max(MIN_PERIOD_S, now - since))
    came = [
        item
        for item in recent
        if now - period_s < item.submitted_at <= now
        and item.demand is not None
        and item.state is not ItemState.REFUSED
    ]
    times = sorted(
        (item.submitted_at + number * period_s, item.id, item)
        for item in came
        for number in range(1, NUM_PERIODS + 1)
    )
    return tuple(
        replace(
            item,
            id=FIRST_ID + number,
            state=ItemState.WAITING,
            submitted_at=at,
            queued_at=at,
            not_before=at,
            after=(),
            rank=None,
            place=None,
            process=None,
            launch="",
            progress=0.0,
        )
        for number, (at, _, item) in enumerate(times[:MAX_EXPECTED])
    )
