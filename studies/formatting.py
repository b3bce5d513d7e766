"""Settings, values, counts and durations as text, the same in the terminal and in reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autosft.studies.search.dimensions import Value
from autosft.studies.search.settings import SETTINGS
from autosft.studies.trial import TrialRecord, TrialState


def format_settings(parameters: Sequence[tuple[str, Value]], defaults: Mapping[str, Value]) -> str:
    """Describe what a trial tries: the learning rate, and whatever else differs from the default trial."""
    return " ".join(
        _setting(name, value)
        for name, value in sorted(parameters, key=lambda item: item[0] != "learning_rate")
        if name == "learning_rate" or defaults.get(name) != value
    )


def _setting(name: str, value: Value) -> str:
    text = format_number(value) if isinstance(value, float) else str(value)
    setting = SETTINGS.get(name)
    if setting is None:  # written by a version with more settings
        return f"{name} {text}"
    return setting.short + (text.partition("_")[0] if setting.first_word else text)


def format_number(value: float) -> str:
    """Format a number with three significant digits, small ones as 1.2e-3."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_metric(value: float | None) -> str:
    """Format a loss, perplexity or accuracy in at most six characters."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}"[:6].rstrip(".") if abs(value) < 1e5 else f"{value:.0e}"


def format_count(value: float | None) -> str:
    """Format a count or a rate in at most five characters: 950, 12.3k, 4.1M."""
    if value is None:
        return ""
    for bound, unit in ((1e3, ""), (1e6, "k"), (1e9, "M")):
        if value < bound * 0.9995:
            scaled = value / (bound / 1e3)
            return f"{scaled:.0f}{unit}" if not unit or scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{value / 1e9:.1f}G"


def format_duration(seconds: float) -> str:
    """Format a duration for people: 40 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    seconds = max(0, round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 60:
        return f"{seconds} s"
    if minutes < 10:
        return f"{minutes} min {seconds % 60:02d} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60:02d} min" if days < 2 else f"{days} d {hours % 24} h"


def end_reason(trial: TrialRecord) -> str:
    """Return why a trial ended early; empty if it ran to the end."""
    parts = [trial.failure.value if trial.failure else "", trial.message]
    if trial.state is TrialState.STOPPED and not any(parts):
        return f"stopped early: hopeless against the others at step {last_step(trial)}"
    return ": ".join(part for part in parts if part)


def last_step(trial: TrialRecord) -> int:
    """Return the optimizer step of a trial's last evaluation; 0 if there is none."""
    return trial.measurements[-1].step if trial.measurements else 0
