"""The output of `autosft plan`: ways to run each method, a memory bar, and a comparison of methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.memory_ways import EXACT
from autosft.profiles.model.adapters import describe_adapter, describe_start
from autosft.profiles.optimizers import OPTIMIZERS
from autosft.profiles.recipe import Checkpointing, MemoryEstimate, Method, Sharding
from autosft.profiles.units import GIB, gib
from autosft.scheduler.decide.cpu_precision import why_in_bf16
from autosft.scheduler.decide.measured_memory import MEASURED
from autosft.scheduler.decide.planner import describe_guess, not_followed
from autosft.scheduler.plan.forecast import Way
from autosft.scheduler.plan.method_plan import MethodPlan
from autosft.scheduler.plan.remedies import Remedy, shorter_lengths
from autosft.studies.formatting import format_count, format_duration
from autosft.ui.tables import new_table
from autosft.ui.ways_view import excess_text, named, recommendation

if TYPE_CHECKING:
    from rich.table import Table

    from autosft.scheduler.plan.method_plan import DeviceAnswer
    from autosft.scheduler.plan.task import Task
    from autosft.studies.trial import TrainingSettings

#: Parts of a bar: letter (told apart without colour too), name, colour.
PARTS = (
    ("P", "parameters", "blue"),
    ("G", "gradients", "magenta"),
    ("O", "optimizer state", "cyan"),
    ("A", "activations", "green"),
    ("L", "logits and loss", "yellow"),
    ("I", "inputs", "bright_green"),
    ("W", "workspace", "white"),
    ("F", "fragmentation", "bright_magenta"),
    ("C", "context", "bright_blue"),
    ("+", "margin", "bright_black"),
)
INDENT = 2
MAX_BAR_WIDTH = 100
#: How many shorter lengths to show truncation for.
NUM_SHORTER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicesAtHand:
    """What a plan is for: a device, how many of its kind there are, and where it comes from."""

    device: DeviceProfile
    number: int = 1
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.device.name if self.number == 1 else f"{self.number} x {self.device.name}"


def task_lines(task: Task, settings: TrainingSettings) -> list[str]:
    """Describe the task: model, lengths and their source, batch."""
    from autosft.profiles.dataset import describe, truncation_report

    model = task.model
    lines = [f"{model.source}: {model.num_parameters:,} parameters, {model.architecture}"]
    if model.note:
        lines.append(model.note)
    if task.data is None:
        lines.append(
            f"No --data: {round(task.num_train_examples / task.epochs):,} examples are assumed, all of "
            f"{task.seq_len:,} tokens, every token scored."
        )
    else:
        lines += describe(task.data, [task.seq_len])
        shorter = shorter_lengths(task.seq_len)[:NUM_SHORTER]
        lines += [
            f"length {cut.seq_len:,} would cut {cut.truncated_share:.1%} of the examples and "
            f"{cut.lost_scored_share:.1%} of the scored tokens"
            for cut in truncation_report(task.data, shorter)
        ]
    if task.padding_free:
        lines.append("Without padding: the examples of a micro batch share a row and do not see each other.")
    lines.append(
        f"Effective batch {settings.effective_batch_size}, {settings.optimizer}, {task.epochs:g} epochs: "
        f"{max(1, settings.num_train_examples // settings.effective_batch_size):,} steps."
    )
    return lines


def whole_plan(
    heading: Sequence[str],
    plans: Iterable[MethodPlan],
    devices: DevicesAtHand,
    width: int,
    *,
    what_is_timed: str = "training alone",
) -> Iterator[RenderableType]:
    """Yield the whole plan from top to bottom, each method as soon as `plans` has it."""
    yield from heading
    yield from devices.notes
    device = devices.device
    where = "assumed idle, not found here" if device.is_assumed else f"on {device.node}"
    each = "" if devices.number == 1 else " each"
    yield f"{devices.label} ({where}): {gib(usable_bytes(device))} to use of {gib(device.total_bytes)}{each}."
    shown: list[MethodPlan] = []
    for plan in plans:
        shown.append(plan)
        yield ""
        yield method_part(plan, devices, width)
    if len(shown) > 1:
        yield ""
        yield Text("Compared", style="bold")
        yield comparison(shown)
        yield from recommendation(shown)
    yield ""
    yield from footnotes(shown, what_is_timed=what_is_timed)


def method_part(plan: MethodPlan, devices: DevicesAtHand, width: int) -> RenderableType:
    """Show a method: ways to run it and where the memory goes, or what would fit instead."""
    settings, device = plan.settings, devices.device
    title = Text(named(plan), style="bold")
    adapter = "" if settings.adapter is None else f", {describe_adapter(settings.adapter)}"
    title.append(
        f"  {plan.precision.value}{adapter}, {plan.num_trained:,} trained, {gib(plan.saved_bytes)} saved",
        style="not bold",
    )
    parts: list[RenderableType] = []
    shown = plan.chosen or plan.measured_with or plan.smallest
    if plan.measured_with is not None:
        shown = plan.measured_with
        parts += measuring_lines(plan, shown)
    elif plan.chosen is None:
        parts += refusal(plan, device)
        shown = plan.together or shown
    else:
        parts += [ways_table(plan.front, plan.chosen), describe_largest(plan), *bf16_lines(plan)]
    if plan.together is not None:
        parts += together_lines(plan, plan.together, devices)
    if shown.memory.untraced:
        return Group(title, Padding(Group(*parts), (0, 0, 0, INDENT)))
    parts.append(memory_bar(shown.memory, usable_bytes(device), min(width - INDENT, MAX_BAR_WIDTH)))
    parts.append(f"largest at the {shown.memory.peak_phase}: {shown.memory.peak_owner}.")
    if shown.memory.phases:
        peaks = ", ".join(f"{name} {gib(size)}" for name, size in shown.memory.phases)
        parts.append(f"peak by phase: {peaks}.")
    return Group(title, Padding(Group(*parts), (0, 0, 0, INDENT)))


def measuring_lines(plan: MethodPlan, way: Way) -> Iterator[str]:
    """Describe how the first trial measures what could not be predicted."""
    yield (
        f"measured, not predicted: the first trial measures itself, alone on its device and capped at "
        f"{gib(plan.measuring_cap_bytes)}, with micro batch {way.micro_batch} and checkpointing "
        f"{checkpointing_text(way.checkpointing)}; if it runs out of memory, it continues with fewer rows."
    )
    why, way_out = not_followed(way.memory), way.memory.way_out
    yield f"{why[:1].upper()}{why[1:]}. {describe_guess(way.memory)}."
    if way_out:
        yield f"To have it predicted: {way_out[:1].lower()}{way_out[1:]}"


def ways_table(front: Sequence[Way], chosen: Way) -> Table:
    """Return the table of ways to run, smallest first; an arrow marks the planner's choice."""
    table = new_table()
    for heading in ("", "micro batch", "checkpointing", "needs", "at most", "tokens/s", "time"):
        table.add_column(
            heading, justify="left" if heading in ("", "checkpointing") else "right", no_wrap=True
        )
    for way in front:
        table.add_row(
            "→" if way is chosen else "",
            f"{way.micro_batch} x {way.gradient_accumulation}",
            checkpointing_text(way.checkpointing),
            gib(way.memory.need.median_bytes + way.memory.outside_bytes),
            gib(way.memory.total_bytes),
            format_count(way.tokens_per_s),
            format_duration(way.run_s),
            style="bold" if way is chosen else None,
        )
    return table


def checkpointing_text(checkpointing: Checkpointing) -> str:
    return "off" if checkpointing is Checkpointing.OFF else "on"


def describe_largest(plan: MethodPlan) -> str:
    """Name the largest micro batch that fits, and what the chosen way would hold without a limit."""
    assert plan.chosen is not None
    largest = " and ".join(
        f"{size} with checkpointing {checkpointing_text(checkpointing)}"
        for checkpointing, size in plan.largest_micro_batches
    )
    memory = plan.chosen.memory
    text = f"Largest micro batch that fits: {largest}.  → reserves {gib(memory.total_bytes)}"
    uncapped = memory.uncapped.median_bytes + memory.outside_bytes
    if uncapped <= memory.total_bytes:
        return text + "."
    return text + f"; without a limit it would hold up to {gib(uncapped)}."


def bf16_lines(plan: MethodPlan) -> Iterator[str]:
    """Say why a CPU trains in bf16, and how not to."""
    if plan.speedup_in_bf16 is not None:
        yield why_in_bf16(plan.speedup_in_bf16)


def refusal(plan: MethodPlan, device: DeviceProfile) -> Iterator[RenderableType]:
    """Describe how much memory is missing, and list the nearest changes that would fit."""
    memory = plan.smallest.memory
    missing = memory.total_bytes - usable_bytes(device)
    yield (
        f"does not fit: micro batch {plan.smallest.micro_batch} with checkpointing "
        f"{checkpointing_text(plan.smallest.checkpointing)} needs "
        f"{gib(memory.need.median_bytes + memory.outside_bytes)} (at most {gib(memory.total_bytes)}), "
        f"{gib(missing)} more than there is."
    )
    if plan.remedies:
        yield "would fit:"
        yield Padding(remedies_table(plan.remedies), (0, 0, 0, INDENT))
    elif plan.together is None:
        yield "nothing nearby would fit: another method, a shorter length, 8 GPUs or a known card."


def together_lines(plan: MethodPlan, way: Way, devices: DevicesAtHand) -> Iterator[str]:
    """Describe how a trial would run on several of the devices that are there."""
    if plan.chosen is not None:
        yield f"A study runs a trial on each of the {devices.number}, at the same time."
    memory = way.memory
    over = "both" if way.num_devices == devices.number == 2 else f"{way.num_devices} of {devices.number}"
    needs = gib(memory.need.median_bytes + memory.outside_bytes)
    yield (
        f"One trial over {over} ({way.sharding.value.upper()}): micro batch {way.micro_batch} x "
        f"{way.gradient_accumulation} on each, checkpointing {checkpointing_text(way.checkpointing)}, needs "
        f"{needs} on each (at most {gib(memory.total_bytes)}), {format_count(way.tokens_per_s)} tokens/s, "
        f"{format_duration(way.run_s)}."
    )


def remedies_table(remedies: Sequence[Remedy]) -> Table:
    table = new_table()
    for heading in ("change", "needs", "at most", "time", "loss of quality"):
        is_words = heading in ("change", "loss of quality")
        table.add_column(
            heading, justify="left" if is_words else "right", no_wrap=heading != "loss of quality"
        )
    for remedy in remedies:
        memory, sharding = remedy.way.memory, remedy.way.sharding
        table.add_row(
            remedy.change + ("" if sharding is Sharding.NONE else f" {sharding.value.upper()}"),
            gib(memory.need.median_bytes + memory.outside_bytes),
            gib(memory.total_bytes),
            hours(remedy.way.run_s),
            remedy.quality,
        )
    return table


def memory_bar(memory: MemoryEstimate, budget_bytes: int, width: int) -> RenderableType:
    """Draw what the memory is taken by, up to the bound, against what there is; with its legend."""
    sizes = bar_sizes(memory)
    scale = max(budget_bytes, sum(sizes.values()))
    bar = Text()
    at = [round(width * end / scale) for end in accumulate(sizes.values())]
    for (letter, name, colour), start, end in zip(PARTS, [0, *at], at, strict=False):
        assert name in sizes
        bar.append(letter * (end - start), style=f"black on {colour}")
    limit = round(width * budget_bytes / scale)
    bar.append("·" * max(0, limit - len(bar)), style="dim")
    if limit < len(bar):  # what is beyond the device is underlined
        bar.stylize("underline bold", limit)
    legend = [
        Text.assemble((letter, f"black on {colour}"), f" {name} {gib(sizes[name])}")
        for letter, name, colour in PARTS
        if sizes[name] >= (50 << 20) or sizes[name] * width >= scale
    ]
    return Group(bar, Columns(legend, padding=(0, 2)))


def bar_sizes(memory: MemoryEstimate) -> dict[str, int]:
    """Return the parts of a bar in order; they add up to the bound on the memory that must be free."""
    components = dict(memory.components)
    return {
        **{name: components.get(name, 0) for _, name, _ in PARTS[:7]},
        "fragmentation": max(0, memory.need.median_bytes - memory.allocated.median_bytes),
        "context": memory.outside_bytes,
        "margin": memory.need.upper_bytes - memory.need.median_bytes,
    }


def comparison(plans: Sequence[MethodPlan]) -> Table:
    """Compare methods: trained parameters, memory, time on several devices."""
    table = new_table()
    nums = [num for num, _ in plans[0].by_num_devices]
    times = [f"{num} GPU" + "s" * (num > 1) for num in nums] if len(nums) > 1 else ["time"]
    has_ways = any(plan.memory != EXACT.name for plan in plans)
    headings = ("method", "trained", "needs", "at most", *times, *(["loss over fp32's"] if has_ways else []))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for plan in plans:
        shown = plan.chosen or plan.measured_with or plan.smallest
        share = 100 * plan.num_trained / plan.num_total
        table.add_row(
            named(plan),
            f"{format_count(plan.num_trained)} {share:.{1 if share < 1 else 3}g} %",
            gib(shown.memory.need.median_bytes + shown.memory.outside_bytes),
            gib(shown.memory.total_bytes),
            *(device_text(way, fewest_devices(plan)) for _, way in plan.by_num_devices),
            *([excess_text(plan)] if has_ways else []),
        )
    return table


def fewest_devices(plan: MethodPlan) -> Way | None:
    """Return the way that fits on the fewest devices, the baseline for speed-ups."""
    return next((way for _, way in plan.by_num_devices if way is not None), None)


def device_text(way: Way | None, fewest: Way | None) -> str:
    """Format a way's time and, below, its speed-up and sharding; "no" if nothing fits."""
    if way is None or fewest is None:
        return "no"
    if way.sharding is Sharding.NONE:
        return hours(way.run_s)
    speedup = "" if way is fewest else f"{fewest.run_s / way.run_s:.2g}x "
    return f"{hours(way.run_s)}\n{speedup}{way.sharding.value.upper()}"


def hours(seconds: float) -> str:
    """Format a duration briefly: 43 min, 14.3 h."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def devices_table(answers: Sequence[DeviceAnswer]) -> Table:
    """Return the table of devices that can run each method: a row per device, a column per method."""
    table = new_table()
    methods = list(dict.fromkeys(answer.method for answer in answers))
    table.add_column("device", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    for method in methods:
        table.add_column(method.value, no_wrap=True)
    by_place = {(answer.device, answer.method): answer for answer in answers}
    for device in dict.fromkeys(answer.device for answer in answers):
        row = [by_place[device, method] for method in methods]
        table.add_row(
            device,
            f"{row[0].usable_bytes / GIB:.1f}",
            *(answer_text(answer) for answer in row),
            style=None if any(answer.fits for answer in row) else "dim",
        )
    return table


def answer_text(answer: DeviceAnswer) -> str:
    if answer.fits:
        return f"{gib(answer.way.memory.total_bytes)} {hours(answer.way.run_s)}"
    if answer.is_measured:
        return f"measures itself, guess {gib(answer.way.memory.need.median_bytes)}"
    return f"lacks {gib(answer.way.memory.total_bytes - answer.usable_bytes)}"


def memory_note(memory: MemoryEstimate) -> str:
    """Describe how memory was predicted, and how reliable that is."""
    number = memory.num_calibration_rows
    if memory.untraced:
        return (
            "Memory: measured, not predicted, by the first trial; later ones are planned with what it took."
        )
    if memory.method == MEASURED:
        return (
            f'Memory: measured, not predicted, by {number} earlier trials; "at most" is a tenth above them.'
        )
    rows = f"learned from {number} runs" if number else "no runs yet"
    return f'Memory: {memory.method}; "at most" holds at a level of {memory.bound_level:.0%} ({rows}).'


def footnotes(plans: Sequence[MethodPlan], *, what_is_timed: str) -> Iterator[str]:
    """State how reliable the figures are, and what is only modelled."""
    shown = [plan.chosen or plan.measured_with or plan.smallest for plan in plans]
    yield memory_note(shown[0].memory)
    slower = max(way.upper_run_s / way.run_s for way in shown)
    yield f"Time: {what_is_timed}, from {shown[0].speed_basis}; up to {slower:.2g} times as long."
    yield from sorted({said for plan in plans if (said := describe_start(plan.settings.adapter))})
    if any(num > 1 for num, _ in plans[0].by_num_devices):
        yield "Several GPUs are calculated, not measured: no run has confirmed these figures yet."
    if any(plan.method is Method.QLORA for plan in plans) and not importlib.util.find_spec("bitsandbytes"):
        yield "QLoRA: 4-bit layers are modelled; training needs bitsandbytes: pip install 'autosft[gpu]'."
    for name in dict.fromkeys(plan.settings.optimizer for plan in plans):
        row = OPTIMIZERS[name]
        if not row.is_installed:
            yield f"--optimizer {row.name}: training needs {row.package}: pip install {row.package}"
