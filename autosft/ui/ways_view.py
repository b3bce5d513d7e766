"""The ways to hold what full fine-tuning trains, as a plan shows them: names, loss, which to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autosft.profiles.memory_ways import EXACT, WAYS, loss_in_words, measured_loss
from autosft.scheduler.plan.method_plan import MethodPlan


def named(plan: MethodPlan) -> str:
    """Name a plan by its method and, where it is not exact, by how that holds what it trains."""
    return plan.method.value + ("" if plan.memory == EXACT.name else f" --memory {plan.memory}")


def excess_text(plan: MethodPlan) -> str:
    """Format the measured loss of a way to hold what is trained over fp32's."""
    found = measured_loss(WAYS[plan.memory])
    return "-" if found is None else f"{found.excess:+.1%} ± {found.half_width:.1%}"


def recommendation(plans: Sequence[MethodPlan]) -> Iterator[str]:
    """Say which way to hold what is trained to take, and what is known of its loss."""
    for method in dict.fromkeys(plan.method for plan in plans):
        ways = [plan for plan in plans if plan.method is method]
        fitting = [plan for plan in ways if plan.chosen is not None]
        if len(ways) < 2 or not fitting:
            continue
        taken = fitting[0]  # they are in the order of what they cost in loss
        why = "it fits, and the others save only memory"
        if taken.memory != EXACT.name:
            why = f"the first that fits; {loss_in_words(WAYS[taken.memory])}"
        yield f"Recommended for {method.value}: --memory {taken.memory} ({why})."
