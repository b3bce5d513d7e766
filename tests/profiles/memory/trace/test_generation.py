from __future__ import annotations

from typing import Any

import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory import estimate
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.program.run import Run
from autosft.profiles.memory.program_cache import step_programs
from autosft.profiles.recipe import AdapterSettings, Generation, Method, Precision
from tests.profiles.memory.models import config_json, device_profile, length_profile, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from autosft.profiles.memory.trace.generation_step import segments_of  # noqa: E402 - needs torch
from autosft.workers.scoring.generation import bytes_per_sequence  # noqa: E402

SIZES = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
GENERATION = Generation(prompt_tokens=90, new_tokens=30)


def traced_peak_bytes(config: str, batch: int, generation: Generation = GENERATION, **recipe: Any) -> int:
    """Return the most that is live while a batch of prompts is answered, the model included."""
    kind = recipe.pop("kind", DeviceKind.CUDA)
    programs = step_programs(config, step_recipe(**recipe), kind, (8, 0), trusted=False, cache_dir=None)
    short, long, window = programs.for_generation(GENERATION)
    setup = programs.for_batch(_any_batch()).segments["setup"]
    steps = [(setup, Shape(batch=1, seq=2, scored=1)), *segments_of(short, long, window, generation, batch)]
    run = Run(steps)
    assert run.live_bytes()[-1] == run.live_bytes()[0], "nothing of it stays"
    return run.allocated_bytes()


def _any_batch() -> Any:
    from autosft.profiles.memory.batches import Batch

    return Batch(shape=Shape(batch=2, seq=97, scored=50), padded=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "more"),
    [("llama", {}), ("mistral", {"sliding_window": 100}), ("gpt_neox", {})],
)
def test_answers_hold_what_transformers_really_holds(model_type: str, more: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from autosft.profiles.memory.trace.shallow_model import load_config
    from benchmarks.real_step import LiveBytes

    config = config_json(model_type, **SIZES, **more)
    model = AutoModelForCausalLM.from_config(load_config(config), dtype=torch.float32).eval()
    counter = LiveBytes()
    counter.count_model(model)
    ids = torch.randint(5, 1000, (4, GENERATION.prompt_tokens))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with counter, torch.no_grad():
        new = GENERATION.new_tokens
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    traced = traced_peak_bytes(config, 4, kind=DeviceKind.CPU, precision=Precision.FP32)
    assert traced == pytest.approx(counter.peak, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_the_batch_of_answers_is_chosen_by_more_than_they_hold(model_type: str) -> None:
    from autosft.profiles.memory.trace.shallow_model import load_config

    config = config_json(model_type, **SIZES, num_hidden_layers=8)
    num_tokens = GENERATION.prompt_tokens + GENERATION.new_tokens
    for precision, size in ((Precision.BF16, 2), (Precision.FP32, 4)):
        nothing = traced_peak_bytes(config, 1, Generation(prompt_tokens=8, new_tokens=8), precision=precision)
        one = bytes_per_sequence(load_config(config), num_tokens=num_tokens, dtype_bytes=size)
        for batch in (1, 16):
            assert traced_peak_bytes(config, batch, precision=precision) - nothing < batch * one


@pytest.mark.slow
def test_long_answers_own_the_peak_and_adapters_take_part() -> None:
    config = config_json(**SIZES)
    lora = AdapterSettings(rank=4, alpha=8, targets="all-linear")
    recipe = step_recipe(
        method=Method.LORA, adapter=lora, generation=Generation(prompt_tokens=400, new_tokens=30_000)
    )
    got = estimate(config, recipe, 1, length_profile(40), device_profile())
    assert got.untraced == ()
    assert got.peak_phase == "generation"
    assert "key-value cache" in got.peak_owner
    cache_bytes = 6 * 2 * 2 * 32 * 30_400 * 2  # layers, keys and values, heads, width, tokens, bf16
    phases = dict(got.phases)
    assert phases["generation"] == got.uncalibrated_bytes > phases["evaluation"]
    assert dict(got.components)["activations"] == pytest.approx(cache_bytes, rel=0.2)


@pytest.mark.slow
def test_answers_beyond_a_sliding_window_keep_only_the_window() -> None:
    config = config_json("mistral", **SIZES, sliding_window=200)
    free = config_json("mistral", **SIZES, sliding_window=None)
    long = Generation(prompt_tokens=90, new_tokens=2000)
    assert traced_peak_bytes(config, 4, long) < traced_peak_bytes(free, 4, long)
