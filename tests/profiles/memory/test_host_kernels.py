"""Kernels that a CPU compiles for bf16: few sizes, and what they take; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from autosft.profiles.child_python import python
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.hardware.host import profile_host
from autosft.profiles.memory.host_kernels import (
    FIRST_BYTES,
    Rows,
    compiles_per_shape,
    kernels,
    padded_lengths,
    padded_size,
    with_kernels,
)
from autosft.profiles.model.profile import LinearGroup, ModelProfile, load_model_profile
from autosft.profiles.recipe import AdapterSettings, LengthProfile, Method, Precision
from tests.plans import memory_estimate
from tests.profiles.memory.models import config_json, step_recipe


@pytest.mark.parametrize(
    ("number", "size"),
    [(1, 64), (64, 64), (65, 128), (512, 512), (513, 576), (1023, 1024), (1025, 1152), (4000, 4096)],
)
def test_sizes_are_few_and_at_most_an_eighth_larger(number: int, size: int) -> None:
    assert padded_size(number) == size


def test_up_to_a_length_there_are_few_sizes() -> None:
    sizes = {padded_size(number) for number in range(1, 4097)}
    assert len({size for size in sizes if size <= 512}) == 8
    assert len(sizes) == 8 + 3 * 8
    assert all(padded_size(size) == size for size in sizes)
    assert all(number <= padded_size(number) <= max(number + 63, 1.125 * number) for number in range(1, 4097))


def test_rows_are_padded_up_to_the_truncation_length_and_labels_up_to_the_row() -> None:
    lengths = LengthProfile(lengths=(10, 64, 70, 100), scored=(0, 3, 70, 65), max_length=100)
    padded = padded_lengths(lengths)
    assert padded.lengths == (64, 64, 100, 100)
    assert padded.scored == (0, 64, 100, 100)
    assert padded.max_length == 100


@pytest.mark.parametrize(
    ("precision", "kind", "expected"),
    [
        (Precision.FP32, DeviceKind.CPU, False),
        (Precision.BF16_AUTOCAST, DeviceKind.CPU, True),
        (Precision.BF16, DeviceKind.CPU, True),
        (Precision.BF16, DeviceKind.CUDA, False),
    ],
)
def test_a_cpu_compiles_in_16_bits(precision: Precision, kind: DeviceKind, *, expected: bool) -> None:
    assert compiles_per_shape(precision, kind) is expected


LLAMA = load_model_profile("Llama-2-7b", need_tokenizer=False, need_weights=False)
MIXTURE = replace(LLAMA, config_json=config_json("mixtral", num_local_experts=4))
ROWS = Rows(
    micro_batch=1, lengths=LengthProfile(lengths=(64, 128), scored=(9, 9), max_length=128), evaluated=None
)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (MIXTURE, {}),
        (replace(LLAMA, num_attention_heads=0), {}),
        (LLAMA, {"padding_free": True}),
        (LLAMA, {"method": Method.QLORA}),
        (LLAMA, {"precision": Precision.BF16_STOCHASTIC}),
    ],
    ids=["experts", "no attention", "packed rows", "4-bit weights", "stochastic rounding"],
)
def test_what_was_not_measured_is_not_known(model: ModelProfile, changes: dict[str, Any]) -> None:
    recipe = step_recipe(precision=Precision.BF16_AUTOCAST)
    assert kernels(LLAMA, recipe, ROWS) is not None
    assert kernels(model, replace(recipe, **changes), ROWS) is None


def test_more_lengths_take_more_and_rare_ones_widen_the_bound() -> None:
    recipe = step_recipe(precision=Precision.BF16_AUTOCAST)
    one = replace(ROWS.lengths, lengths=(128, 128))
    often = kernels(LLAMA, recipe, ROWS)
    never = kernels(LLAMA, recipe, replace(ROWS, lengths=one))
    rare = kernels(
        LLAMA, recipe, replace(ROWS, lengths=replace(one, lengths=(64, *[128] * 99), scored=(9,) * 100))
    )
    assert often is not None
    assert never is not None
    assert rare is not None
    assert never.usual_bytes == rare.usual_bytes < often.usual_bytes
    assert never.most_bytes < rare.most_bytes == often.most_bytes
    both = kernels(LLAMA, recipe, replace(ROWS, evaluated=one))
    assert both is not None
    assert often.usual_bytes < both.usual_bytes
    adapter = AdapterSettings(rank=8, alpha=16, targets=("q_proj",))
    lora = kernels(LLAMA, replace(recipe, method=Method.LORA, adapter=adapter), ROWS)
    assert lora is not None
    assert often.usual_bytes < lora.usual_bytes


def test_memory_with_kernels_still_adds_up() -> None:
    before = memory_estimate()
    taken = kernels(LLAMA, step_recipe(precision=Precision.BF16_AUTOCAST), ROWS)
    assert taken is not None
    after = with_kernels(before, taken)
    assert after.need.median_bytes - before.need.median_bytes == taken.usual_bytes
    assert after.need.upper_bytes - before.need.upper_bytes == taken.most_bytes
    more = sum(size for _, size in after.components) - sum(size for _, size in before.components)
    assert more == taken.usual_bytes


GROWTH = """
import gc, json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1])))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

sizes = []
for length in (512, *json.loads(sys.argv[2])):
    ids = torch.randint(0, 500, (1, length))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    model.zero_grad()
    del loss
    gc.collect()
    sizes.append(resident())
print(json.dumps(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not profile_host().supports_bf16, reason="this CPU does not multiply bf16 in hardware")
def test_each_new_row_length_really_takes_what_is_predicted() -> None:
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    lengths = [64, 128, 192, 256, 320, 64, 128, 192, 256, 320]
    command = python("-c", GROWTH, json.dumps(shape), json.dumps(lengths))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *sizes = json.loads(done.stdout.splitlines()[-1])
    grown, again = sizes[4] - first, sizes[-1] - sizes[4]
    groups = [LinearGroup(name=name, in_features=i, out_features=o, count=2) for name, i, o in
              (("q_proj", 128, 128), ("up_proj", 128, 320), ("down_proj", 320, 128))]  # fmt: skip
    model = replace(LLAMA, linear_groups=tuple(groups))
    each = tuple(sorted(set(lengths)))
    rows = Rows(
        micro_batch=1, lengths=LengthProfile(lengths=each, scored=each, max_length=512), evaluated=None
    )
    taken = kernels(model, step_recipe(precision=Precision.BF16_AUTOCAST), rows)
    assert taken is not None
    assert grown == pytest.approx(taken.usual_bytes - FIRST_BYTES, rel=0.25)
    assert again < grown / 8  # what is compiled is used again
