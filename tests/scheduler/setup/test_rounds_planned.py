"""Where trials differ in the rounds that they keep, each is planned for its own conversations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import Checkpointing
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.planner import recipe_for
from tests.cli.chat_model import make_chat_model, write_chats
from tests.profiles.memory.models import device_profile
from tests.workers.small import pinned, settings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("home")
    turns = [
        turn
        for number in range(8)
        for turn in (
            {"role": "user", "content": f"say {number} " * 4},
            {"role": "assistant", "content": f"yes {number} " * 4},
        )
    ]
    model = make_chat_model(home / "model")
    data = prepare(
        str(write_chats(home / "chats.jsonl", [{"messages": turns[: 2 * (1 + n % 8)]} for n in range(60)])),
        model=str(model),
        cache_dir=home / "cache",
        max_positions=512,
        train_rounds=(1, 8),
    )
    return Models.of_data(load_model_profile(str(model)), data, 4)


@pytest.mark.slow
def test_a_trial_of_fewer_rounds_needs_less_and_is_faster(models: Models, tmp_path: Path) -> None:
    from tests.workers.small import make_data

    trial = settings(seq_len=512, effective_batch_size=8, num_train_examples=480)
    pins = pinned(make_data(tmp_path))
    device = device_profile(DeviceKind.CPU)

    def cost(max_rounds: int | None) -> tuple[int, float]:
        chosen = replace(trial, max_rounds=max_rounds)
        recipe = recipe_for(chosen, pins, Checkpointing.OFF, 1)
        need = models.estimate(recipe, 8, 512, device).need.median_bytes
        return need, models.speed(recipe, 8, chosen, device, 1).run_s

    one, eight = cost(1), cost(8)
    assert one[0] < eight[0]
    assert one[1] < eight[1]
    assert cost(None) == eight  # what is planned for no trial is planned for the longest
