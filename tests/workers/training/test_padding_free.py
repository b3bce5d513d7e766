"""Examples in one row without padding are the same experiment as the same examples with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from autosft.profiles.memory.batches import draw_row_order
from autosft.profiles.recipe import Checkpointing, LengthProfile, Method, Precision
from autosft.scheduler.decide.planner import recipe_for
from autosft.studies.trial import AttemptEnd, Measurement, TrainingSettings
from autosft.workers.training.example_order import order_examples
from tests.workers import small

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from autosft.workers.training.train import train  # noqa: E402 - needs torch
from tests.workers.training.test_zero_masks import pruned, unstructured  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_data(tmp_path_factory.mktemp("data"))


def run(job: Any) -> tuple[AttemptEnd, list[Measurement]]:
    reports: list[Measurement] = []
    return train(job, reports.append, lambda: None), reports


CASES: dict[str, tuple[TrainingSettings, dict[str, Any]]] = {
    "whole batch": (small.settings(), {"micro_batch": 8}),
    "one at a time": (small.settings(), {"micro_batch": 1}),
    "checkpointed": (small.settings(), {"micro_batch": 4, "checkpointing": Checkpointing.NON_REENTRANT}),
    "LoRA, accumulated": (small.lora(), {"micro_batch": 2}),
    "sparse": (small.settings(method=Method.SPARSE), {"micro_batch": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_losses_gradients_and_scores_are_those_of_padded_batches(
    name: str, model: Path, data: Path, tmp_path: Path
) -> None:
    settings, cut = CASES[name]
    if settings.method is Method.SPARSE:
        model = pruned(tmp_path / "pruned", unstructured)
    ran = {}
    for padding_free in (False, True):
        job = small.job(
            model,
            data,
            tmp_path / str(padding_free),
            settings=settings,
            pinned=small.pinned(data, padding_free=padding_free),
            plan=small.plan(effective_batch_size=8, **cut),
        )
        end, reports = run(job)
        assert end.completed
        said = [(report.loss, report.grad_norm, report.metric("eval_loss")) for report in reports]
        ran[padding_free] = [number for numbers in said for number in numbers if number is not None]
    assert len(ran[True]) == len(ran[False]) > 16
    assert ran[True] == pytest.approx(ran[False], rel=2e-5)


@pytest.mark.slow
def test_bf16_autocast_agrees_within_its_own_rounding(model: Path, data: Path, tmp_path: Path) -> None:
    losses = [
        run(
            small.job(
                model,
                data,
                tmp_path / str(padding_free),
                pinned=small.pinned(data, padding_free=padding_free, precision=Precision.BF16_AUTOCAST),
            )
        )[1][-1].metric("eval_loss")
        for padding_free in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=4e-3)


def test_a_run_of_rows_has_exactly_the_same_examples(model: Path, data: Path, tmp_path: Path) -> None:
    def course(*, padding_free: bool) -> Any:
        cut = small.plan(micro_batch=2, effective_batch_size=8)
        pinned = small.pinned(data, padding_free=padding_free)
        return order_examples(small.job(model, data, tmp_path, plan=cut, pinned=pinned))

    row, padded = course(padding_free=True), course(padding_free=False)
    assert row.dataset["input_ids"] == padded.dataset["input_ids"]
    assert row.padded_at_step == row.tokens_at_step == padded.tokens_at_step
    lengths = row.dataset["length"]
    sums = [sum(lengths[start : start + 2]) for start in range(0, len(lengths), 2)]
    assert sum(lengths[i] for i in row.worst) == max(sums)
    recipe = recipe_for(small.settings(), small.pinned(data, padding_free=True), Checkpointing.OFF, 4)
    prepared = load_from_disk(str(data / "train"))
    profile = LengthProfile(
        lengths=tuple(prepared["length"]), scored=tuple(n - 2 for n in prepared["length"]), max_length=12
    )
    planned = draw_row_order(profile, 2, num_batches=4, seed=9, per_step=4, order=recipe.order)
    assert [batch.shape.seq for batch in planned.first] == sums[:4], "what is planned for is what comes"
    assert planned.worst.shape.seq == max(sums)
