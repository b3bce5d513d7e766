"""The families that people tune: each traced as it really runs, and predicted at its full depth."""

from __future__ import annotations

import json
from typing import Any

import pytest

from autosft.profiles.memory.program.program import Shape
from autosft.profiles.recipe import AdapterSettings, Method, Precision
from benchmarks.families import BY_NAME, FAMILIES
from tests.profiles.memory.models import config_json, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from autosft.profiles.memory.trace.shallow_model import shallow_model  # noqa: E402 - needs torch
from benchmarks.real_step import predicted_peak_bytes, real_peak_bytes, traced_peak_bytes  # noqa: E402

pytestmark = pytest.mark.slow

SHAPE = Shape(batch=2, seq=33, scored=2 * 32)
FP32: dict[str, Any] = {"precision": Precision.FP32, "optimizer": "adamw_torch"}
AUTOCAST: dict[str, Any] = {"precision": Precision.BF16_AUTOCAST, "optimizer": "adamw_torch"}
LORA = {"method": Method.LORA, "adapter": AdapterSettings(rank=4, alpha=8, targets="all-linear")}
#: Whose layers take one token after the other: seconds.
SEQUENTIAL = {"Recurrent Gemma", "Jamba", "Mamba", "Falcon Mamba", "RWKV", "Kimi Linear"}
#: Whose layers make many operators: a second or two, left out of the quick tests.
LONG = {"Qwen 3 Next", "Zamba 2", "Falcon H1", "Gemma 4", "Qwen 3.5", "Bamba"}
#: One of each kind of step, for what takes longer.
UNLIKE = ("Mixtral", "DeepSeek V3", "gpt-oss", "Granite 4 hybrid", "Mamba 2", "Gemma 4", "Qwen 3 VL")
DEEPER = ("DeepSeek V3", "LFM 2", "Nemotron H", "Qwen 3.5", "Phi 3, LongRoPE")


def families(*names: str) -> list[Any]:
    chosen = [BY_NAME[name] for name in names] or list(FAMILIES)
    return [
        pytest.param(item, id=item.name, marks=[pytest.mark.slow] if item.name in SEQUENTIAL | LONG else [])
        for item in chosen
    ]


@pytest.mark.parametrize("family", families())
def test_a_traced_step_holds_what_the_real_one_does(family: Any) -> None:
    recipe = step_recipe(**FP32, attention=family.attention)
    traced, real = (of(family.config_json, recipe, SHAPE) for of in (traced_peak_bytes, real_peak_bytes))
    assert traced[1] == real[1]
    # optimizers count their steps in a tensor of four bytes, on the CPU wherever the parameter is
    assert traced[0] == pytest.approx(real[0], abs=4096)


@pytest.mark.parametrize("family", families(*UNLIKE))
@pytest.mark.parametrize("setting", [AUTOCAST, {**FP32, **LORA}], ids=["autocast", "LoRA"])
def test_other_settings_of_unlike_families(family: Any, setting: dict[str, Any]) -> None:
    recipe = step_recipe(**setting, attention=family.attention)
    traced, real = (of(family.config_json, recipe, SHAPE) for of in (traced_peak_bytes, real_peak_bytes))
    assert traced == (pytest.approx(real[0], abs=4096), real[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", families("DeepSeek V3", "LFM 2", "Nemotron H", "Qwen 3.5", "Phi 3, LongRoPE")
)
def test_a_full_depth_is_predicted_from_the_layers_that_differ(family: Any) -> None:
    recipe, shape = step_recipe(**FP32, attention=family.attention), Shape(batch=3, seq=131, scored=390)
    real, _ = real_peak_bytes(family.config_json, recipe, shape, block_bytes=512)
    assert predicted_peak_bytes(family.config_json, recipe, shape) == pytest.approx(real, rel=0.01)


DEEP = {**BY_NAME["DeepSeek V3"].config, "num_hidden_layers": 12}
KINDS: list[tuple[str, str, tuple[int, ...]]] = [
    ("one kind", config_json(num_hidden_layers=5), (0, 1, 1, 1, 2)),
    (
        "three dense layers, then experts",
        json.dumps({**DEEP, "first_k_dense_replace": 3}),
        (0, 1, 1, *(2,) * 8, 3),
    ),
    ("a pattern in a list", BY_NAME["LFM 2"].config_json, (0, 1, 2, 1, 1, 3)),
    ("a pattern that is repeated", BY_NAME["Recurrent Gemma"].config_json, (0, 1, 2, 1, 1, 2, 1, 1, 3)),
    ("attention by the numbers of layers", BY_NAME["Bamba"].config_json, (0, 1, 2, 1, 1, 3)),
    ("periods that no list says: all", BY_NAME["Jamba"].config_json, tuple(range(8))),
    ("an embedding as wide as the model is deep: all", BY_NAME["Gemma 4"].config_json, tuple(range(6))),
    ("a factor that depends on the depth", BY_NAME["MiniCPM 3"].config_json, (0, 1, 1, 1, 1, 2)),
]


@pytest.mark.parametrize(("config", "kinds"), [case[1:] for case in KINDS], ids=[case[0] for case in KINDS])
def test_layers_that_are_alike_stand_for_one_another(config: str, kinds: tuple[int, ...]) -> None:
    assert shallow_model(config).layer_kinds == kinds


EQUATIONS = [
    ("bclhn,bcshn->bclsh", (2, 3, 4, 5, 6), (2, 3, 4, 5, 6)),
    ("bclsh,bcshp->bclhp", (2, 3, 4, 4, 5), (2, 3, 4, 5, 6)),
    ("bclhn,bclhp->bchpn", (2, 3, 4, 5, 6), (2, 3, 4, 5, 7)),
    ("bzch,bzhpn->bchpn", (1, 3, 4, 5), (1, 3, 5, 6, 7)),
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("ij,kj->ki", (3, 4), (5, 4)),
]


@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS)
def test_einsum_in_torch_functions_is_einsum(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    from autosft.profiles.memory.trace.einsum import einsum_of_two

    a, b = torch.randn(left), torch.randn(right)
    got = einsum_of_two(lambda item: item, equation, a, b)
    assert got is not None
    torch.testing.assert_close(got, torch.einsum(equation, a, b))


@pytest.mark.parametrize("equation", ["ij,jk,kl->il", "ii->i", "ij,j", "...i,i->..."])
def test_other_einsums_are_left_to_torch(equation: str) -> None:
    from autosft.profiles.memory.trace.einsum import einsum_of_two

    operands = [torch.randn(3, 3) for _ in range(equation.count(",") + 1)]
    assert einsum_of_two(lambda item: item, equation, *operands) is None


PRODUCTS = {  # shapes of what is transposed into the operands, as kernels want their rows aligned
    "rows by expert": lambda: (torch.zeros(10, 8), torch.zeros(2, 5, 8).transpose(1, 2)),
    "gradient of the weights": lambda: (torch.zeros(10, 8).T, torch.zeros(10, 12)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_groups_are_as_large_as_the_kernels_make_them(name: str) -> None:
    from autosft.profiles.memory.trace.kernel_shapes import output_of

    left, right = PRODUCTS[name]()
    operator, ends = torch.ops.aten._grouped_mm.default, torch.tensor([4, 10], dtype=torch.int32)
    real = operator(left, right, ends)
    got = output_of(operator, (left.to("meta"), right.to("meta"), ends.to("meta")))
    assert got is not None
    assert (got.shape, got.stride()) == (real.shape, real.stride())
    assert got.untyped_storage().nbytes() == real.untyped_storage().nbytes()
