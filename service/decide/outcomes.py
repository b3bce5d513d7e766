"""What the end of a driver means for its item.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from autosft.service.values import Item, ItemState

#: Starts in a row whose driver vanished without progress, from which on the item has failed.
MAX_LOST = 3
#: The exit codes of a command that was stopped and kept everything, and of one whose surroundings have died.
STOPPED, INTERRUPTED = 130, 75


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A driver that has ended: its exit code, None if it vanished, and what it said last."""

    exit_code: int | None
    message: str = ""
    at: float | None = None  # UNIX seconds; None: not known
    has_no_word: bool = False  # it failed without saying why, as no command of ours does: it was ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What follows for the item."""

    state: ItemState
    note: str
    was_lost: bool = False


def _how(ended: Ended) -> str:
    code = ended.exit_code
    if code is None:
        return "vanished"
    if code == INTERRUPTED:
        first, *_ = [*ended.message.removeprefix("error: ").splitlines(), "its surroundings failed"]
        return f"was interrupted ({first[:300]})"
    if ended.has_no_word:
        return f"was ended by something else (exit code {code})"
    return f"was killed by signal {code - 128 if code > 0 else -code}"


def outcome(item: Item, ended: Ended) -> Outcome:
    """Return the state that follows the end of a placed item's driver.

    Work that is complete is done, whatever was asked meanwhile.  What was asked to stop has stopped, however
    it ended, except where it failed by itself.  Nothing of this counts as a failure of the item, except its
    own errors, and MAX_LOST drivers in a row that vanished without progress.
    """
    code = ended.exit_code
    was_killed = code is None or code >= 128 or code < 0 or ended.has_no_word
    was_interrupted = was_killed or code == INTERRUPTED
    if code == 0:
        return Outcome(state=ItemState.DONE, note="")
    if item.then is ItemState.CANCELLED or (item.then is not None and was_interrupted):
        return Outcome(state=item.then, note=item.note)
    if code == STOPPED:
        note = "It was stopped from outside the queue; release it to go on."
        return Outcome(state=ItemState.HELD, note=note)
    if was_interrupted:
        how = _how(ended)
        if item.num_lost + 1 >= MAX_LOST:
            note = f"Its process {how}, {MAX_LOST} times in a row without progress. {ended.message}".strip()
            return Outcome(state=ItemState.FAILED, note=note)
        note = f"Its process {how}; it goes on from its last checkpoints."
        return Outcome(state=ItemState.PREEMPTED, note=note, was_lost=True)
    return Outcome(state=ItemState.FAILED, note=ended.message or f"It ended with exit code {code}.")
