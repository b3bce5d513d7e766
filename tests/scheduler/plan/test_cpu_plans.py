"""How `autosft plan` plans for a CPU: its precision, and the threads of each trial."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import Checkpointing, LengthProfile, Method, Precision
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.planner import recipe_for
from autosft.scheduler.plan import method_plan
from autosft.scheduler.plan.forecast import Forecast
from autosft.scheduler.plan.method_plan import plan_method
from autosft.ui.plan_view import bf16_lines
from tests.scheduler.devices import gpu
from tests.scheduler.plan.test_method_plan import forecast, wanted

__all__ = ["forecast"]  # a fixture

pytestmark = pytest.mark.slow

RATES = {"matmul_flops_per_s": 1e11, "memory_bytes_per_s": 1e11, "reused_bytes_per_s": 1e11}


def host(**changes: Any) -> DeviceProfile:
    made = replace(gpu(), kind=DeviceKind.CPU, num_cores=1, free_bytes=8 << 30, total_bytes=8 << 30)
    return replace(made, rates_measured=True, **{**RATES, **changes})


@pytest.mark.parametrize(
    ("device", "asked", "expect"),
    [
        (host(bf16_flops_per_s=1e12), None, Precision.BF16_AUTOCAST),
        (host(), None, Precision.BF16_AUTOCAST),
        (host(supports_bf16=False), None, Precision.FP32),
        (host(bf16_flops_per_s=1e11), None, Precision.FP32),
        (host(bf16_flops_per_s=1e12, free_bytes=500 << 20), None, Precision.FP32),
        (host(bf16_flops_per_s=1e12), Precision.FP32, Precision.FP32),
    ],
    ids=["measured", "not measured", "without instructions", "no faster", "too large in bf16", "asked for"],
)
def test_a_cpu_that_is_faster_in_bf16_is_planned_so(
    device: DeviceProfile, asked: Precision | None, expect: Precision, forecast: Forecast
) -> None:
    asking = forecast if asked is None else forecast.in_precision(asked)
    plan = plan_method(wanted(forecast), device, asking)
    assert plan.precision is expect
    shown = " ".join(bf16_lines(plan))
    assert ("times as fast as --precision fp32" in shown) is (expect is Precision.BF16_AUTOCAST)


@pytest.mark.parametrize(("micro_batch", "measured"), [(1, 1.11), (4, 1.10)])
def test_the_gain_in_bf16_is_predicted_as_it_is_measured(micro_batch: int, measured: float) -> None:
    """SmolLM2-135M with LoRA, 128 tokens a row, half of them scored (`benchmarks/step_speed.py`)."""
    model = load_model_profile("SmolLM2-135M", need_tokenizer=False)
    lengths = LengthProfile(lengths=(128,) * 64, scored=(64,) * 64, max_length=128)
    known = Forecast(Models(model, lambda *_: lengths))
    settings = wanted(known, Method.LORA, seq_len=128, batch=micro_batch)
    # The rates that are assumed of a core.
    device = host(matmul_flops_per_s=None, memory_bytes_per_s=None, reused_bytes_per_s=None)
    steps = []
    for precision in (Precision.FP32, Precision.BF16_AUTOCAST):
        pinned = known.in_precision(precision).pinned(settings, device)
        recipe = recipe_for(settings, pinned, Checkpointing.OFF, 1)
        steps.append(known.models.uncorrected_step(recipe, micro_batch, 128, device, num_threads=1).step_s)
    assert steps[0] / steps[1] == pytest.approx(measured, rel=0.1)


def test_padded_rows_train_no_more_tokens(forecast: Forecast) -> None:
    """Rows of 65 tokens are padded to 128 in bf16: the step takes longer, and trains the same."""
    lengths = LengthProfile(lengths=(65,) * 64, scored=(65,) * 64, max_length=256)
    models, settings = Models(forecast.model, lambda *_: lengths), wanted(forecast)
    steps = [
        models.uncorrected_step(
            recipe_for(
                settings, forecast.in_precision(precision).pinned(settings, host()), Checkpointing.OFF, 1
            ),
            4,
            256,
            host(supports_bf16=False),
            num_threads=1,
        )
        for precision in (Precision.FP32, Precision.BF16_AUTOCAST)
    ]
    assert [round(step.tokens_per_s * step.step_s) for step in steps] == [4 * 65, 4 * 65]
    assert steps[1].step_s > steps[0].step_s


@pytest.mark.parametrize(("total_gib", "expected"), [(1, [1]), (20, [1, 4]), (30, [1, 8])])
def test_a_cpu_is_planned_with_the_threads_that_a_study_gives_a_trial(
    total_gib: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight cores and 48 GiB: trials of 20 GiB run two at once with four threads each."""
    asked: list[int] = []

    def plan(_settings: object, _device: DeviceProfile, forecast: Any, _at_hand: int) -> Any:
        asked.append(forecast.num_threads)
        memory = SimpleNamespace(total_bytes=total_gib << 30)
        return SimpleNamespace(chosen=SimpleNamespace(memory=memory))

    monkeypatch.setattr(method_plan, "plan_with_threads", plan)
    made = Forecast(SimpleNamespace(model=None), precision=Precision.FP32)  # type: ignore[arg-type]
    host = replace(gpu(), kind=DeviceKind.CPU, num_cores=8, free_bytes=48 << 30, total_bytes=48 << 30)
    plan_method(None, host, made)  # type: ignore[arg-type]
    assert asked == expected
    asked.clear()
    plan_method(None, gpu(), made)  # type: ignore[arg-type]
    assert asked == [1]
