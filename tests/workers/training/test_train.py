from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method
from autosft.studies.files.checkpoints import install
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrialJob
from autosft.workers.training.example_order import evaluation_steps, order_examples
from autosft.workers.training.sft_config import sft_config_fields
from autosft.workers.training.train import train
from tests.workers.small import job, lora, make_data, make_model, pinned, plan, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def run(
    what: TrialJob, stop: Callable[[list[Measurement]], StopReason | None] = lambda _: None
) -> tuple[AttemptEnd, list[Measurement]]:
    reports: list[Measurement] = []
    end = train(what, reports.append, lambda: stop(reports))
    return end, reports


def losses(reports: list[Measurement]) -> list[float]:
    return [report.metric("eval_loss") or math.nan for report in reports if report.is_evaluation]


def test_a_run_learns_and_leaves_a_loadable_model_per_evaluation(
    model: Path, data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    end, reports = run(job(model, data, tmp_path))
    assert end.completed
    assert end.failure is None
    evaluations = [report for report in reports if report.is_evaluation]
    assert [(evaluation.step, evaluation.evaluation) for evaluation in evaluations] == [
        (2, 1),
        (4, 2),
        (6, 3),
        (8, 4),
    ]
    assert losses(reports)[-1] < losses(reports)[0]
    for evaluation in evaluations:
        assert evaluation.checkpoint is not None
        folder = Path(evaluation.checkpoint)
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        assert not (folder / "training_args.bin").exists()
    assert not list(tmp_path.glob("staging*"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["full", "lora"])
def test_micro_batch_and_accumulation_do_not_change_the_run(
    model: Path, data: Path, tmp_path: Path, what: str
) -> None:
    chosen = settings() if what == "full" else lora()
    curves = []
    for micro_batch, checkpointing in (
        (1, Checkpointing.OFF),
        (2, Checkpointing.NON_REENTRANT),
        (8, Checkpointing.OFF),
    ):
        _, reports = run(
            job(
                model,
                data,
                tmp_path / str(micro_batch),
                settings=chosen,
                plan=plan(micro_batch=micro_batch, effective_batch_size=8, checkpointing=checkpointing),
            )
        )
        curves.append(losses(reports))
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)
    assert curves[1] == pytest.approx(curves[2], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_attempt_continues_exactly(model: Path, data: Path, tmp_path: Path) -> None:
    _, whole = run(job(model, data, tmp_path / "whole"))

    def leave(reports: list[Measurement]) -> StopReason | None:
        return StopReason.SHUTDOWN if reports and reports[-1].step >= 5 else None

    end, first = run(job(model, data, tmp_path / "parts"), leave)
    assert end.stopped is StopReason.SHUTDOWN
    checkpoint = first[-1].checkpoint
    assert checkpoint is not None
    end, rest = run(job(model, data, tmp_path / "parts", attempt=2, resume_from=checkpoint))
    assert end.completed
    assert losses(first) + losses(rest) == losses(whole)


@pytest.mark.slow
def test_a_stop_is_heard_between_micro_batches_and_the_checkpoint_is_that_of_the_last_whole_step(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """With dropout, so that random numbers drawn by the step that is dropped would show."""
    dropping = settings(
        method=Method.LORA,
        adapter=AdapterSettings(rank=4, alpha=8.0, targets="all-linear", dropout=0.3),
    )
    parts = {"settings": dropping, "plan": plan(micro_batch=2, effective_batch_size=8)}
    _, whole = run(job(model, data, tmp_path / "whole", **parts))
    calls: list[int] = []

    def leave(reports: list[Measurement]) -> StopReason | None:
        if reports and reports[-1].step == 5:  # and no evaluation stands there
            calls.append(1)
            return StopReason.SHUTDOWN if len(calls) > 2 else None  # asked after each micro batch
        return None

    end, first = run(job(model, data, tmp_path / "parts", **parts), leave)
    assert end.stopped is StopReason.SHUTDOWN
    assert first[-1].step == 5, "not after the sixth"
    checkpoint = first[-1].checkpoint
    assert checkpoint is not None
    end, rest = run(job(model, data, tmp_path / "parts", attempt=2, resume_from=checkpoint, **parts))
    assert end.completed
    assert losses(first) + losses(rest) == losses(whole)


@pytest.mark.parametrize("resealed", [False, True])
def test_resume_state_is_checked_and_never_runs_code(
    model: Path, data: Path, tmp_path: Path, resealed: bool
) -> None:
    _, reports = run(job(model, data, tmp_path), lambda got: StopReason.SHUTDOWN if len(got) > 2 else None)
    checkpoint = Path(reports[-1].checkpoint or "")
    proof = tmp_path / "code has run"
    with (checkpoint / "optimizer.pt").open("wb") as file:
        pickle.dump(Malicious(proof), file)
    if resealed:  # by someone who knows how
        install(checkpoint, checkpoint.with_name("resealed"))
        checkpoint = checkpoint.with_name("resealed")
    expected, words = (pickle.UnpicklingError, None) if resealed else (UserError, "sha256 differs")
    with pytest.raises(expected, match=words):
        run(job(model, data, tmp_path, attempt=2, resume_from=str(checkpoint)))
    assert not proof.exists()


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.proof,)


def test_a_pruned_attempt_ends_at_once_with_the_reason(model: Path, data: Path, tmp_path: Path) -> None:
    end, reports = run(job(model, data, tmp_path), lambda got: StopReason.PRUNED if losses(got) else None)
    assert (end.completed, end.stopped) == (False, StopReason.PRUNED)
    assert reports[-1].step < 8


def test_a_loss_that_is_not_a_number_is_a_result(model: Path, data: Path, tmp_path: Path) -> None:
    end, _ = run(
        job(model, data, tmp_path, settings=settings(learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e9))
    )
    assert end.failure is FailureKind.NON_FINITE_LOSS
    assert "nan" in end.message or "inf" in end.message


def test_scores_on_other_examples_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the ones this study is measured on"):
        run(job(model, data, tmp_path, pinned=pinned(data, eval_fingerprint="0" * 64)))


def test_the_evaluation_batch_does_not_change_the_score(model: Path, data: Path, tmp_path: Path) -> None:
    scores = []
    for micro_batch in (1, 10):
        _, reports = run(
            job(
                model,
                data,
                tmp_path / str(micro_batch),
                settings=settings(num_train_examples=8),
                pinned=pinned(data, eval_micro_batch=micro_batch, num_evaluations=1),
            )
        )
        scores.append(losses(reports)[0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_the_order_of_examples_depends_on_the_seed_and_not_on_the_plan(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def order(micro_batch: int, seed: int) -> list[list[int]]:
        return list(
            order_examples(
                job(
                    model,
                    data,
                    tmp_path,
                    settings=settings(seed=seed),
                    plan=plan(micro_batch=micro_batch, effective_batch_size=8),
                )
            ).dataset["input_ids"]
        )

    assert order(1, 0) == order(8, 0)
    assert order(1, 0) != order(1, 1)


def test_the_examples_of_a_step_go_longest_first(model: Path, data: Path, tmp_path: Path) -> None:
    lengths = order_examples(job(model, data, tmp_path)).dataset["length"]
    size = settings().effective_batch_size
    steps = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    assert steps == [sorted(step, reverse=True) for step in steps]
    assert any(max(after) > min(before) for before, after in itertools.pairwise(steps)), "not over steps"


def test_padded_tokens_are_known_beforehand(model: Path, data: Path, tmp_path: Path) -> None:
    cut = plan(micro_batch=2, effective_batch_size=8)
    course = order_examples(job(model, data, tmp_path, plan=cut))
    lengths = course.dataset["length"]
    micro_batches = [lengths[start : start + 2] for start in range(0, len(lengths), 2)]
    assert course.padded_at_step[-1] == sum(2 * max(both) for both in micro_batches)
    assert len(course.padded_at_step) == course.num_steps + 1
    padding = [a - b for a, b in zip(course.padded_at_step, course.tokens_at_step, strict=True)]
    assert padding == sorted(padding)


def test_a_run_reports_its_remaining_time(model: Path, data: Path, tmp_path: Path) -> None:
    _, reports = run(job(model, data, tmp_path))
    said = [report.remaining_s for report in reports]
    told = [item for item in said if item is not None]
    assert said[: len(said) - len(told)] == [None] * (len(said) - len(told)), "none at first, then always"
    assert told
    assert min(told) >= 0.0
    assert said[-1] == 0.0


def test_a_limit_on_examples_is_a_limit_on_different_ones(model: Path, data: Path, tmp_path: Path) -> None:
    limited = order_examples(job(model, data, tmp_path, settings=settings(max_train_samples=4)))
    assert len(limited.dataset) == 64
    assert len({tuple(row) for row in limited.dataset["input_ids"]}) <= 4


def test_examples_whose_answer_is_cut_off_are_passed_over(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training example has an answer within the first 2 tokens"):
        order_examples(job(model, data, tmp_path, settings=settings(seq_len=2)))


@pytest.mark.parametrize(
    ("num_steps", "num_evaluations", "expected"),
    [
        (8, 4, {2: 1, 4: 2, 6: 3, 8: 4}),
        (10, 4, {3: 1, 5: 2, 8: 3, 10: 4}),
        (2, 4, {1: 2, 2: 4}),
        (1, 1, {1: 1}),
    ],
)
def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end(
    num_steps: int, num_evaluations: int, expected: dict[int, int]
) -> None:
    assert evaluation_steps(num_steps, num_evaluations) == expected


def test_every_field_of_the_installed_sft_config_is_set(model: Path, data: Path, tmp_path: Path) -> None:
    from trl import SFTConfig

    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    assert set(sft_config_fields(job(model, data, tmp_path), num_steps=8, staging_dir="x")) == names
