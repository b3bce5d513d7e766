"""Print what `autosft plan` says of the settings of two hand-written guides, as docs/plans.md shows it.

    python benchmarks/guide_plans.py                      the tables
    python benchmarks/guide_plans.py --write docs/plans.md    put them into the document

Nothing is measured: these are the product's predictions for cards that need not be here, without anything
that earlier trials have taught.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autosft.scheduler.plan.forecast import Forecast, Way
    from autosft.scheduler.plan.method_plan import MethodPlan

BEGIN = "<!-- printed by benchmarks/guide_plans.py -->"
END = "<!-- end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """The settings of one guide, and the cards that it speaks of."""

    title: str
    model: str
    seq_len: int
    effective_batch_size: int
    num_train_examples: int  # of the whole run
    cards: tuple[str, ...]
    methods: tuple[str, ...]


GUIDES = (
    Guide(
        title="SmolLM2-135M, length 1024, effective batch 64, 5 epochs of 6,000 conversations",
        model="SmolLM2-135M",
        seq_len=1024,
        effective_batch_size=64,
        num_train_examples=30_000,
        cards=("RTX-4060-Laptop",),
        methods=("full",),
    ),
    Guide(
        title="Llama-2-7b, length 1024, effective batch 8, 3 epochs of 2,900 blocks",
        model="Llama-2-7b",
        seq_len=1024,
        effective_batch_size=8,
        num_train_examples=8_700,
        cards=("V100-32GB", "A100-40GB", "A100-80GB"),
        methods=("full", "lora", "qlora"),
    ),
)
HEADINGS = ("card", "method", "GPUs", "micro batch", "checkpointing", "needs", "at most", "tokens/s", "time",
            "largest without / with checkpointing")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in this document")
    arguments = parser.parse_args()
    text = "\n".join(tables())
    print(text)
    if arguments.write is not None:
        document = arguments.write.read_text(encoding="utf-8")
        before, rest = document.split(BEGIN)
        after = rest.split(END)[1]
        arguments.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def tables(guides: tuple[Guide, ...] = GUIDES) -> Iterator[str]:
    """Yield the lines of a table for every guide."""
    for guide in guides:
        if guide is not guides[0]:
            yield ""
        yield from (f"**{guide.title}**", "")
        yield "| " + " | ".join(HEADINGS) + " |"
        yield "|---" * len(HEADINGS) + "|"
        for row in rows(guide):
            yield "| " + " | ".join(row) + " |"


def rows(guide: Guide) -> Iterator[tuple[str, ...]]:
    """Yield for each card and method the smallest way, the largest micro batches, and what the plan takes."""
    from autosft.profiles.hardware.known_devices import cluster_from_name
    from autosft.profiles.recipe import Method
    from autosft.scheduler.plan.forecast import default_settings
    from autosft.scheduler.plan.method_plan import plan_method

    with tempfile.TemporaryDirectory() as folder:
        forecast = forecast_for(guide, Path(folder))
        for card in guide.cards:
            device = cluster_from_name(card).devices[0]
            for name in guide.methods:
                settings = default_settings(
                    Method(name),
                    forecast.model,
                    seq_len=guide.seq_len,
                    effective_batch_size=guide.effective_batch_size,
                    num_train_examples=guide.num_train_examples,
                )
                plan = plan_method(settings, device, forecast)
                yield from (cells(card, plan, way, mark) for way, mark in shown(plan))


def forecast_for(guide: Guide, cache_dir: Path) -> Forecast:
    """Return the models that the plan asks, with examples that are all as long as the guide's."""
    from autosft.profiles.model.profile import load_model_profile
    from autosft.profiles.recipe import LengthProfile
    from autosft.scheduler.decide.cost_models import Models
    from autosft.scheduler.plan.forecast import Forecast

    lengths = LengthProfile(
        lengths=(guide.seq_len,) * 256, scored=(guide.seq_len,) * 256, max_length=guide.seq_len
    )
    model = load_model_profile(guide.model, need_tokenizer=False)
    return Forecast(Models(model, lambda *_: lengths, cache_dir=cache_dir))


def shown(plan: MethodPlan) -> Iterator[tuple[Way, str]]:
    """Yield the ways that are worth a line, with a mark: on one card, and on four where they fit."""
    if plan.chosen is not None:
        if plan.front[0] is not plan.chosen:
            yield plan.front[0], ""
        yield plan.chosen, "→ "
    else:
        yield plan.smallest, "does not fit: "
        yield from ((way, "") for num, way in plan.by_num_devices if num > 1 and way is not None)


def cells(card: str, plan: MethodPlan, way: Way, mark: str) -> tuple[str, ...]:
    from autosft.profiles.recipe import Checkpointing
    from autosft.profiles.units import gib
    from autosft.studies.formatting import format_count
    from autosft.ui.plan_view import checkpointing_text, hours

    sizes = dict(plan.largest_micro_batches)
    largest = (str(sizes.get(item, "none")) for item in (Checkpointing.OFF, Checkpointing.NON_REENTRANT))
    return (
        card,
        plan.method.value,
        f"{way.num_devices}" + ("" if way.num_devices == 1 else f", {way.sharding.value.upper()}"),
        f"{mark}{way.micro_batch} x {way.gradient_accumulation}",
        checkpointing_text(way.checkpointing),
        gib(way.memory.need.median_bytes + way.memory.outside_bytes),
        gib(way.memory.total_bytes),
        format_count(way.tokens_per_s),
        hours(way.run_s),
        " / ".join(largest) if way is plan.chosen else "",
    )


if __name__ == "__main__":
    main()
