"""Every optimizer of the table does what it is asked for in the product's own trainer, or is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.optimizers import OPTIMIZERS, Decay, find_optimizer, require_optimizer
from autosft.profiles.recipe import Method, Precision
from tests.optimizer_packages import PACKAGES, ROOT, environment

PROVEN = [row for row in OPTIMIZERS.values() if row.is_proven]
ON_CPU = [row.name for row in PROVEN if not row.pages]
REFUSED = [row.name for row in OPTIMIZERS.values() if not row.is_proven]
#: A step may move weights by so much more at one rate than at another, the rates taken out: six times less
#: is what a schedule that is not followed would give.
SPREAD = 2.5

pytestmark = pytest.mark.slow


def in_own_process(module: str, *args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each optimizer did (`optimizer_runs.facts`)."""
    output = tmp_path_factory.mktemp("optimizers") / "facts.json"
    names = [name for name in ON_CPU if not OPTIMIZERS[name].package or PACKAGES.is_dir()]
    in_own_process("tests.workers.training.optimizer_runs", str(output), *names)
    return dict(json.loads(output.read_text()))


@pytest.fixture
def fact(request: pytest.FixtureRequest, seen: dict[str, Any]) -> dict[str, Any]:
    name = request.getfixturevalue("name")
    if name not in seen:
        pytest.skip(f"{OPTIMIZERS[name].package} is not in {PACKAGES.name}: make test installs it there")
    assert "error" not in seen[name], seen[name]["error"]
    return dict(seen[name])


every_row = pytest.mark.parametrize("name", ON_CPU)


def test_every_name_of_transformers_has_a_row() -> None:
    from transformers.training_args import OptimizerNames

    assert {one.value for one in OptimizerNames} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", [row.name for row in PROVEN if row.pages])
def test_untried_here_as_it_needs_a_gpu(name: str) -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        require_optimizer(name, method=Method.FULL, on_gpu=False, precision=Precision.FP32, is_run_here=False)
    require_optimizer(name, method=Method.FULL, on_gpu=True, precision=Precision.FP32, is_run_here=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_reason_and_the_nearest_that_works(name: str) -> None:
    with pytest.raises(UserError, match=f"--optimizer {name} is refused: .+") as error:
        find_optimizer(name)
    nearest = OPTIMIZERS[name].nearest
    assert f"--optimizer {nearest}" in error.value.remedy
    assert find_optimizer(nearest).is_proven


@every_row
def test_at_a_rate_of_0_nothing_moves(name: str, fact: dict[str, Any]) -> None:
    assert fact["rates"][0] == 0
    assert fact["moved"][0] == 0


@every_row
def test_the_schedule_shows_in_how_far_weights_move(name: str, fact: dict[str, Any]) -> None:
    rates = fact["rates"][1:]
    assert max(rates) / min(rates) == pytest.approx(6)  # warm-up over two steps, then down
    per_rate = [moved / rate for moved, rate in zip(fact["moved"][1:], rates, strict=True)]
    assert max(per_rate) / min(per_rate) < SPREAD


@every_row
def test_weight_decay_has_the_size_that_is_asked_for(name: str, fact: dict[str, Any]) -> None:
    if OPTIMIZERS[name].decay is Decay.IN_GRADIENT:
        assert fact["decay"] > 100  # far off: and therefore only without
        with pytest.raises(UserError, match="does not apply weight decay in the size"):
            require_optimizer(
                name,
                method=Method.FULL,
                on_gpu=True,
                precision=Precision.FP32,
                largest_decay=0.1,
                is_run_here=False,
            )
    else:
        assert fact["decay"] == pytest.approx(1, rel=1e-3)


@every_row
def test_the_first_step_stays_within_its_bound(name: str, fact: dict[str, Any]) -> None:
    bound = OPTIMIZERS[name].first_move
    if bound is not None:
        assert bound * 0.9 < fact["first_move"] < bound * 1.01


@every_row
def test_gone_on_with_is_as_without_interruption(name: str, fact: dict[str, Any]) -> None:
    assert fact["resumed"] == 0


@every_row
def test_a_second_trial_in_the_process_is_as_the_first(name: str, fact: dict[str, Any]) -> None:
    assert fact["again"] == 0
    assert fact["again_bytes"] == fact["state_bytes"]


@every_row
def test_tied_weights_are_one_parameter_with_one_moment(name: str, fact: dict[str, Any]) -> None:
    assert fact["tied_moments"] == 0
    assert fact["tied_states"] == (-20 if name == "sgd" else 0)  # which keeps nothing


@every_row
def test_options_written_out_as_defaults_change_nothing(name: str, fact: dict[str, Any]) -> None:
    assert fact.get("options", 0) == 0
    assert fact.get("options_bytes", 0) == 0


@every_row
def test_the_state_is_what_the_memory_model_says(name: str, fact: dict[str, Any]) -> None:
    assert fact["modelled_bytes"] == fact["state_bytes"]
    assert fact["table_bytes"] == fact["state_bytes"]


@every_row
def test_what_a_step_makes_on_its_way_is_what_the_memory_model_says(name: str, fact: dict[str, Any]) -> None:
    assert fact.get("modelled_made", 0) == pytest.approx(fact.get("made", 0), abs=4096)


@pytest.fixture
def rounded(request: pytest.FixtureRequest, seen: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer did with bf16 weights that it rounds at random."""
    name = request.getfixturevalue("name")
    if name not in seen:
        pytest.skip(f"{OPTIMIZERS[name].package} is not in {PACKAGES.name}: make test installs it there")
    return dict(seen[f"{name}, stochastic"])


rounding_rows = pytest.mark.parametrize("name", [row.name for row in PROVEN if row.rounds_stochastically])


@rounding_rows
def test_rounding_at_random_makes_small_steps_on_average(name: str, rounded: dict[str, Any]) -> None:
    assert rounded["dtypes"] == ["torch.bfloat16"]
    assert rounded["drift_to_nearest"] == 0, "each step alone is lost"
    assert rounded["drift"] == pytest.approx(1, abs=0.3)
    assert rounded["rates"][0] == 0
    assert rounded["moved"][0] == 0, "what bf16 holds exactly is not moved by rounding"
    assert all(moved > 0 for moved in rounded["moved"][1:])


@rounding_rows
def test_rounding_at_random_is_the_same_again(name: str, rounded: dict[str, Any]) -> None:
    assert rounded["resumed"] == 0
    assert rounded["again"] == 0
    assert rounded["another_seed"] > 0


@rounding_rows
def test_rounding_at_random_keeps_every_zero_of_a_mask(name: str, rounded: dict[str, Any]) -> None:
    assert rounded["num_zeros"] > 10_000
    assert rounded["zeros_lost"] == 0


@rounding_rows
def test_rounding_at_random_takes_the_bytes_that_are_modelled(name: str, rounded: dict[str, Any]) -> None:
    assert rounded["modelled_bytes"] == rounded["table_bytes"] == rounded["state_bytes"]
    # the state of the generator, which is put back after the step, is 5,056 bytes
    assert rounded["modelled_made"] == pytest.approx(rounded["made"], abs=8192)


#: What transformers and these libraries did without a word (`optimizer_faults`).
WRONG = (
    "schedule_free_warm_up",
    "layerwise",
    "gradient_release",
    "texts_for_booleans",
    "another_trials_embeddings",
    "assigned_tied_weights",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not PACKAGES.is_dir():
        pytest.skip("its packages are not there: make test installs them")
    output = tmp_path_factory.mktemp("faults") / "outcomes.json"
    in_own_process("tests.workers.training.optimizer_faults", str(output))
    return dict(json.loads(output.read_text()))


@pytest.mark.parametrize("case", WRONG)
def test_what_went_wrong_without_a_word(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == ""
