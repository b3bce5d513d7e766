"""What would fit where a study does not: each change with its memory, its time and its price."""

from __future__ import annotations

from collections.abc import Sequence

from autosft.profiles.recipe import Sharding
from autosft.profiles.units import duration, gib
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.planning import Forecast, Remedy, remedies
from autosft.studies.request import TuneRequest


class TooLittleMemoryError(DoesNotFitError):
    """Nothing that was asked for fits; `offers` are changes that would, the message lists them."""

    def __init__(self, cause: DoesNotFitError, offers: Sequence[Remedy]) -> None:
        remedy = "\n".join(("Would fit:", *(f"  {line}" for line in offer_lines(offers))))
        super().__init__(
            cause.message,
            remedy=remedy if offers else cause.remedy,
            smallest=cause.smallest,
            settings=cause.settings,
            device=cause.device,
        )
        self.offers = tuple(offers)


def too_little_memory(cause: DoesNotFitError, models: Models) -> TooLittleMemoryError:
    """Return the error with what would fit; nothing is offered where memory could not be predicted."""
    if cause.smallest.untraced:
        return TooLittleMemoryError(cause, ())
    return TooLittleMemoryError(cause, tuple(remedies(cause.settings, cause.device, Forecast(models))))


def offer_lines(offers: Sequence[Remedy]) -> list[str]:
    """Write each offer as one line: change, memory, time, loss of quality."""
    width = max((len(change_words(one)) for one in offers), default=0)
    lines = []
    for one in offers:
        memory = one.way.memory
        needed = gib(memory.need.median_bytes + memory.outside_bytes)
        lines.append(
            f"{change_words(one):{width}}  needs {needed} (at most {gib(memory.total_bytes)}), "
            f"about {duration(one.way.run_s)}; usual loss of quality: {one.quality}"
        )
    return lines


def change_words(offer: Remedy) -> str:
    sharding = offer.way.sharding
    return offer.change + ("" if sharding is Sharding.NONE else f" with {sharding.value.upper()}")


def takeable(offers: Sequence[Remedy]) -> list[Remedy]:
    """Return the offers that need no other machine."""
    return [one for one in offers if one.fields is not None]


def taken(request: TuneRequest, offer: Remedy) -> TuneRequest:
    """Return the request with an offer's change."""
    assert offer.fields is not None, "what needs another machine cannot be taken"
    fields = dict(offer.fields)
    space = {**request.space, **fields.pop("space", {})}
    return request.model_copy(update={**fields, "space": space})
