from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory import estimate
from autosft.profiles.memory.allocator import trial_settings
from autosft.profiles.memory.allocator.options import ALLOCATOR_VARIABLES
from autosft.profiles.memory.calibration import Calibration, CalibrationRow, row_of
from autosft.profiles.memory.estimate import Evaluation, allocated_bytes
from autosft.profiles.recipe import (
    AdapterSettings,
    Checkpointing,
    LengthProfile,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
)
from tests.profiles.memory.models import config_json, device_profile, length_profile, step_recipe

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

CONFIG = config_json(vocab_size=4000, hidden_size=256, intermediate_size=700, head_dim=64)
LENGTHS = length_profile()
GPU = device_profile()


def answer(
    micro_batch: int = 2, *, kind: DeviceKind = DeviceKind.CUDA, longest: int = 400, **changes: object
) -> MemoryEstimate:
    return estimate(
        CONFIG, step_recipe(**changes), micro_batch, length_profile(longest), device_profile(kind)
    )


@pytest.mark.slow
def test_parts_add_up_and_bounds_are_ordered() -> None:
    for kind in DeviceKind:
        got = answer(kind=kind)
        assert got.method == "trace and replay"
        assert got.untraced == ()
        assert sum(size for _, size in got.components) == got.allocated.median_bytes
        assert got.allocated.median_bytes <= got.need.median_bytes <= got.uncapped.median_bytes
        for part in (got.allocated, got.need, got.uncapped):
            assert part.median_bytes <= part.upper_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", DeviceKind)
def test_rows_without_padding_need_less_where_lengths_differ_and_the_same_for_one_example(
    kind: DeviceKind,
) -> None:
    padded, row = answer(8, kind=kind), answer(8, kind=kind, padding_free=True)
    assert row.untraced == ()
    assert row.need.median_bytes < padded.need.median_bytes
    assert row.stack != padded.stack
    one, alone = answer(1, kind=kind), answer(1, kind=kind, padding_free=True)
    assert alone.need.median_bytes == pytest.approx(one.need.median_bytes, rel=0.02)


def test_layers_that_would_mix_the_examples_of_a_row_are_refused() -> None:
    hybrid = config_json(
        "jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2
    )
    with pytest.raises(UserError, match="would mix the examples"):
        estimate(hybrid, step_recipe(padding_free=True), 2, LENGTHS, GPU)


def test_weights_gradients_and_moments_are_counted_exactly() -> None:
    # embeddings and head 4000 x 256 each; per layer q, k, v, o, gate, up, down and two norms; a last norm
    layer = 256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 700 + 2 * 256
    count = 2 * 4000 * 256 + 6 * layer + 256
    parts = dict(answer().components)
    assert parts["parameters"] == pytest.approx(2 * count, rel=0.01)  # and rotary frequencies, rounding
    assert parts["optimizer state"] == pytest.approx(4 * count, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [Checkpointing.OFF, Checkpointing.NON_REENTRANT])
def test_more_tokens_never_need_less(checkpointing: Checkpointing) -> None:
    by_batch = [answer(n, checkpointing=checkpointing).need.upper_bytes for n in (1, 2, 4, 8)]
    by_length = [
        answer(4, longest=n, checkpointing=checkpointing).need.upper_bytes for n in (100, 200, 400, 800)
    ]
    assert by_batch == sorted(by_batch)
    assert by_length == sorted(by_length)


@pytest.mark.slow
@given(
    st.integers(1, 8),
    st.integers(10, 500),
    st.integers(1, 300),
    st.sampled_from(Checkpointing),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_live_bytes_grow_with_batch_and_length(
    micro_batch: int, longest: int, more: int, checkpointing: Checkpointing, uneven: bool
) -> None:
    recipe = step_recipe(checkpointing=checkpointing)

    def live(batch: int, length: int) -> int:
        lengths = (length,) * 20 + (10 if uneven else length,) * 20
        profile = LengthProfile(lengths=lengths, scored=tuple(n // 2 for n in lengths), max_length=length)
        return allocated_bytes(CONFIG, recipe, batch, profile, GPU)

    assert live(micro_batch, longest) <= live(micro_batch, longest + more)
    assert live(micro_batch, longest) <= live(micro_batch + 1, longest)


def test_an_evaluation_of_more_at_once_than_the_step_can_own_the_peak() -> None:
    step = answer(1)
    wide = estimate(
        CONFIG, step_recipe(), 1, length_profile(400), GPU,
        evaluation=Evaluation(micro_batch=16, lengths=length_profile(2000)),
    )  # fmt: skip
    assert step.peak_phase != "evaluation"
    assert wide.peak_phase == "evaluation"
    assert dict(wide.phases)["evaluation"] == wide.uncalibrated_bytes > step.uncalibrated_bytes
    assert {k: v for k, v in wide.phases if k != "evaluation"} == {
        k: v for k, v in step.phases if k != "evaluation"
    }
    assert max(size for _, size in step.phases) == step.uncalibrated_bytes


@pytest.mark.slow
def test_suggested_remedies_lower_memory() -> None:
    full = answer(8).need.median_bytes
    assert answer(8, checkpointing=Checkpointing.NON_REENTRANT).need.median_bytes < full
    assert answer(8, optimizer="adamw_8bit").need.median_bytes < full
    # adapters keep fp32 copies of their inputs: they save weights' state, not activations
    lora = AdapterSettings(rank=8, alpha=16, targets=("q_proj", "v_proj"))
    lora_need = answer(1, method=Method.LORA, adapter=lora).need.median_bytes
    assert lora_need < answer(1).need.median_bytes
    assert answer(1, method=Method.QLORA, adapter=lora).need.median_bytes < lora_need
    assert answer(8, precision=Precision.FP32).need.median_bytes > full


def test_sharding_splits_the_state_and_ddp_doubles_gradients() -> None:
    one = answer(2)
    ddp = answer(2, sharding=Sharding.DDP, data_parallel=4)
    fsdp = answer(2, sharding=Sharding.FSDP, data_parallel=4)
    assert dict(ddp.components)["gradients"] > dict(one.components)["gradients"]
    assert dict(fsdp.components)["optimizer state"] < dict(one.components)["optimizer state"] / 3
    assert fsdp.outside_bytes > one.outside_bytes


def test_gradients_that_the_optimizer_frees_are_part_of_its_peak() -> None:
    # foreach copies the parameters: the peak is in the optimizer, which drops the gradients only after it
    got = answer(1, longest=20, optimizer="adamw_torch", checkpointing=Checkpointing.NON_REENTRANT)
    parts = dict(got.components)
    assert got.peak_phase == "optimizer"
    assert parts["gradients"] == pytest.approx(parts["parameters"], rel=0.02)
    assert parts["optimizer state"] == pytest.approx(2 * parts["parameters"], rel=0.02)
    assert got.need.median_bytes == pytest.approx(got.allocated.median_bytes, rel=0.1)


@pytest.mark.slow
def test_what_the_optimizer_copies_is_sharded_too() -> None:
    one = answer(1, longest=20, optimizer="adamw_torch")
    four = answer(1, longest=20, optimizer="adamw_torch", sharding=Sharding.FSDP, data_parallel=4)
    assert dict(four.components)["gradients"] < dict(one.components)["gradients"]
    workspace = {n: dict(got.components)["workspace"] - 2 * 8_519_680 for n, got in ((1, one), (4, four))}
    if four.peak_phase == one.peak_phase == "optimizer":
        assert workspace[4] == pytest.approx(workspace[1] / 4, rel=0.05)
    assert four.need.median_bytes < one.need.median_bytes


def test_newer_gpus_share_a_trace() -> None:
    from autosft.profiles.memory.program_cache import step_programs

    made = [
        step_programs(CONFIG, step_recipe(), DeviceKind.CUDA, capability, trusted=False, cache_dir=None)
        for capability in ((8, 0), (8, 9), (9, 0), (7, 0), (7, 5))
    ]
    assert made[0] is made[1] is made[2]
    assert made[3] is made[4] is not made[0]


def test_allocated_bytes_equal_the_estimate() -> None:
    assert allocated_bytes(CONFIG, step_recipe(), 2, LENGTHS, GPU) == answer().uncalibrated_bytes


def test_measured_runs_move_the_bound() -> None:
    prior = answer()
    row = CalibrationRow(fingerprint=prior.stack, predicted_bytes=1000, measured_bytes=1200)
    rows = (row,) * 20
    learned = estimate(CONFIG, step_recipe(), 2, LENGTHS, GPU, calibration=Calibration(rows=rows))
    assert learned.need.upper_bytes > prior.need.upper_bytes
    assert learned.num_calibration_rows == 20


def test_a_known_stack_is_bounded_more_closely_on_a_cpu() -> None:
    def upper(fingerprint: str) -> int:
        row = CalibrationRow(fingerprint=fingerprint, predicted_bytes=1000, measured_bytes=1000)
        rows = Calibration(rows=(row,) * 20)
        cpu = device_profile(DeviceKind.CPU)
        return estimate(CONFIG, step_recipe(), 2, LENGTHS, cpu, calibration=rows).need.upper_bytes

    prior = answer(kind=DeviceKind.CPU)
    known, borrowed = upper(prior.stack), upper("CPU of another kind")
    assert prior.need.median_bytes < known < borrowed < prior.need.upper_bytes


def test_a_run_teaches_the_ratio_that_it_measured() -> None:
    got = answer()
    row = row_of(got, got.uncalibrated_bytes * 2)
    assert row is not None
    assert row.measured_bytes == 2 * row.predicted_bytes
    died = row_of(got, None, out_of_memory=True)
    assert died is not None
    assert died.measured_bytes / died.predicted_bytes > got.need.upper_bytes / got.need.median_bytes
    assert row_of(got, None) is None
    learned = estimate(CONFIG, step_recipe(), 2, LENGTHS, GPU, calibration=Calibration(rows=(died,)))
    assert learned.need.upper_bytes > got.need.upper_bytes
    assert learned.uncalibrated_bytes == got.uncalibrated_bytes


def test_untraceable_steps_are_named_and_not_claimed_to_fit() -> None:
    unknown = CONFIG.replace('"llama"', '"no_such_architecture"')
    got = estimate(unknown, step_recipe(), 2, LENGTHS, GPU)
    assert got.method == "closed form"
    assert got.untraced


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_experts_are_traced_where_their_shapes_do_not_depend_on_the_routing(method: Method) -> None:
    adapter = (
        AdapterSettings(rank=4, alpha=8, targets=("q_proj", "v_proj")) if method is Method.LORA else None
    )
    recipe, config = step_recipe(method=method, adapter=adapter), config_json("mixtral", **EXPERTS)
    new = estimate(config, recipe, 2, LENGTHS, GPU)
    assert new.method == "trace and replay"
    assert new.untraced == ()
    old = dataclasses.replace(GPU, name="V100", compute_capability=(7, 0))
    loop = estimate(config, recipe, 2, LENGTHS, old)  # transformers' own loop over the experts
    assert loop.untraced == ()
    assert loop.allocated.median_bytes > new.allocated.median_bytes


@pytest.mark.slow
def test_models_without_sdpa_are_traced_with_eager_attention() -> None:
    config = config_json("gemma2", sliding_window=128)
    assert estimate(config, step_recipe(attention="eager"), 2, LENGTHS, GPU).untraced == ()


def test_the_allocator_is_the_one_that_a_trial_runs_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trial_settings, "can_expand", lambda: True)
    linux = answer(8)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert answer(8) == linux
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    chosen = answer(8)
    assert chosen.uncapped.median_bytes > linux.uncapped.median_bytes
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(trial_settings, "can_expand", lambda: False)  # Windows, WSL
    assert answer(8) == chosen
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.6")
    with pytest.raises(UserError, match="garbage_collection_threshold"):
        answer(8)


@pytest.mark.slow
def test_modelled_parts_are_named() -> None:
    assert answer(optimizer="adamw_torch").method == "trace and replay"
    assert (
        answer(optimizer="paged_adamw_8bit").method == "trace and replay, paged_adamw_8bit's state modelled"
    )


def test_an_unknown_optimizer_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match="no_such_optimizer: not an optimizer") as error:
        answer(optimizer="no_such_optimizer")
    assert "adamw_torch_fused" in str(error.value)


def test_equal_questions_get_equal_answers_and_seeds_change_little() -> None:
    one = estimate(CONFIG, step_recipe(), 4, LENGTHS, GPU, seed=1)
    assert one == estimate(CONFIG, step_recipe(), 4, dataclasses.replace(LENGTHS), GPU, seed=1)
    other = estimate(CONFIG, step_recipe(), 4, LENGTHS, GPU, seed=2)
    assert other.need.median_bytes == pytest.approx(one.need.median_bytes, rel=0.1)


@pytest.mark.slow
def test_programs_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosft.profiles.memory import program_cache
    from autosft.profiles.memory.trace import trainer_step

    module = importlib.import_module("autosft.profiles.memory.estimate")

    recipe = step_recipe(gradient_accumulation=2)
    first = estimate(CONFIG, recipe, 3, LENGTHS, GPU, cache_dir=tmp_path)
    module._kept_estimate.cache_clear()
    program_cache._step_programs.cache_clear()
    monkeypatch.setattr(trainer_step, "trainer_loop", lambda *_, **__: pytest.fail("traced again"))
    assert estimate(CONFIG, recipe, 3, LENGTHS, GPU, cache_dir=tmp_path) == first
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    monkeypatch.undo()
    module._kept_estimate.cache_clear()
    program_cache._step_programs.cache_clear()
    assert estimate(CONFIG, recipe, 3, LENGTHS, GPU, cache_dir=tmp_path) == first


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, autosft.profiles.memory; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_sparse_fine_tuning_holds_a_bit_a_weight_and_room_to_unpack() -> None:
    full, sparse = answer(), answer(method=Method.SPARSE)
    num_weights = dict(full.components)["parameters"] // 2
    more = sparse.uncalibrated_bytes - full.uncalibrated_bytes
    assert sparse.need.median_bytes - full.need.median_bytes > 0.9 * more  # and segments' remainders
    assert more == pytest.approx(num_weights / 8 + min(num_weights, 1 << 24), rel=0.01)
    assert dict(sparse.components)["workspace"] - dict(full.components)["workspace"] == pytest.approx(more)
