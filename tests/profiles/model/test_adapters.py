"""The adapters of peft: which can be chosen, and that each is traced as it really is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trainable import num_trained
from autosft.profiles.model.adapters import (
    KINDS,
    LORA_VARIANTS,
    REFUSED,
    chosen,
    describe_start,
    holds_adapter_in_fp32,
    peft_config,
    unused_settings,
)
from autosft.profiles.recipe import AdapterSettings, Method, Precision
from autosft.studies.request import read_request
from autosft.studies.search.space import FixedSettings, default_parameters, default_space, settings_from
from autosft.studies.trial import TrainingSettings
from autosft.studies.wire import from_plain, to_plain
from tests.profiles.memory.models import config_json, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from benchmarks.real_step import real_peak_bytes, traced_peak_bytes  # noqa: E402 - needs torch

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
CONFIG = config_json(**SIZES, num_hidden_layers=3)
SHAPE = Shape(batch=2, seq=60, scored=2 * 59)
#: Adapters that put tokens of their own before the input.
VIRTUAL_TOKENS = ("prompt_tuning", "p_tuning")


def adapter(text: str) -> AdapterSettings:
    return AdapterSettings(rank=4, alpha=8, targets="all-linear", **chosen(text))


def test_every_adapter_of_peft_can_be_chosen_or_is_refused_with_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    of_peft = {item.value.lower() for item in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not set(KINDS) & set(REFUSED)
    assert set(KINDS) | set(REFUSED) == of_peft
    assert {kind.peft_type.lower() for kind in KINDS.values()} == set(KINDS)


@pytest.mark.parametrize("name", [*KINDS, *LORA_VARIANTS])
def test_an_adapter_is_traced_as_it_really_is(name: str) -> None:
    text = "vblora,vector_length=32" if name == "vblora" else name
    lora = adapter(text)
    recipe = step_recipe(precision=Precision.FP32, method=Method.LORA, adapter=lora)
    # Behind virtual tokens the first token of an example is predicted, too.
    shape = replace(SHAPE, scored=SHAPE.batch * SHAPE.seq) if name in VIRTUAL_TOKENS else SHAPE
    traced, real = (run(CONFIG, recipe, shape) for run in (traced_peak_bytes, real_peak_bytes))
    assert traced[1] == real[1] == num_trained(CONFIG, lora, trust_remote_code=False) > 0
    assert traced[0] == pytest.approx(real[0], abs=4096)


def test_options_are_read_and_those_that_peft_does_not_have_are_refused() -> None:
    assert peft_config(adapter("prefix-tuning,num_virtual_tokens=8")).num_virtual_tokens == 8
    lora = peft_config(adapter("lora,use_rslora=true,lora_dropout=0.1"))
    assert (lora.use_rslora, lora.lora_dropout) == (True, 0.1)
    with pytest.raises(UserError, match="no_such_option"):
        peft_config(adapter("ia3,no_such_option=1"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adalora", "called after every step"),
        ("loras", "Did you mean lora"),
        ("ia3,8", "'8' is not an option"),
        ("lora,init_lora_weights=pissa", "changes the weights under it"),
    ],
)
def test_what_cannot_be_chosen_is_one_message(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(text)
    assert words in str(error.value)


def test_an_adapter_that_does_not_fit_the_layers_is_refused_with_a_reason() -> None:
    with pytest.raises(UserError, match="vector_length"):
        num_trained(CONFIG, adapter("vblora"), trust_remote_code=False)


def test_what_an_adapter_does_not_take_is_not_searched() -> None:
    assert unused_settings("lora") == unused_settings("dora") == ()
    assert unused_settings("ia3") == ("lora_rank", "lora_alpha_ratio")
    assert unused_settings("prompt_tuning") == ("lora_rank", "lora_alpha_ratio", "lora_targets")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapter": "ia3"}, "goes with --method lora, not auto"),
        ({"adapter": "ia3", "method": "qlora"}, "over 4-bit weights"),
        ({"adapter": "ia3", "method": "lora", "lora_rank": 8}, "has no lora_rank"),
        ({"adapter": "shira", "method": "lora"}, "sparse matrices"),
    ],
)
def test_a_request_names_an_adapter_where_it_has_a_place(given: dict[str, object], words: str) -> None:
    flags = {"space": {"lora_rank": given.pop("lora_rank")}} if "lora_rank" in given else {}
    with pytest.raises(UserError) as error:
        read_request({**given, **flags}, None)
    assert words in str(error.value)


def test_the_settings_of_a_study_hold_its_adapter_and_travel() -> None:
    space = default_space(
        method=Method.LORA,
        num_parameters=1_000_000,
        num_train_examples=1000,
        seq_lens=[64],
        effective_batch_sizes=[8],
    )
    fixed = FixedSettings(num_train_examples=1000, adapter="prefix_tuning,num_virtual_tokens=8")
    settings = settings_from(space, default_parameters(space), fixed)
    assert settings.adapter is not None
    assert (settings.adapter.kind, settings.adapter.options) == (
        "prefix_tuning",
        (("num_virtual_tokens", 8),),
    )
    assert from_plain(TrainingSettings, to_plain(settings)) == settings


START_OPTIONS = {"vblora": ",vector_length=16", "c3a": ",block_size=8"}


@pytest.mark.parametrize(
    "name", [*KINDS, *LORA_VARIANTS, "lora,init_lora_weights=false", "ia3,init_ia3_weights=false"]
)
def test_a_plan_notes_adapters_that_do_not_start_as_their_base(name: str) -> None:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    rows = torch.randint(64, (2, 16))
    mask = torch.ones_like(rows)
    lora = adapter(name + START_OPTIONS.get(name, ""))
    with torch.no_grad():
        plain = base(input_ids=rows, attention_mask=mask).logits
        adapted = get_peft_model(base, peft_config(lora)).eval()(input_ids=rows, attention_mask=mask).logits
    starts_as_base = torch.allclose(adapted[:, -16:], plain, atol=1e-5)
    said = describe_start(lora)
    assert bool(said) != starts_as_base
    assert not said or lora.kind in said


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva"])
def test_starts_that_change_the_base_are_refused(start: str) -> None:
    with pytest.raises(UserError, match="changes the weights under it"):
        chosen(f"lora,init_lora_weights={start}")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "embed_tokens"), 3 * 4 * (128 + 128) + 4 * (2000 + 128)),
        (("q_proj",), 3 * 4 * (128 + 128)),
    ],
)
def test_adapters_on_embeddings_are_counted(targets: tuple[str, ...], expected: int) -> None:
    config = config_json(**{**SIZES, "tie_word_embeddings": True}, num_hidden_layers=3, num_attention_heads=4)
    lora = AdapterSettings(rank=4, alpha=8, targets=targets)
    assert num_trained(config, lora, trust_remote_code=False) == expected


def test_an_adapter_on_the_output_head_is_refused_by_its_name() -> None:
    lora = AdapterSettings(rank=4, alpha=8, targets=("q_proj", "lm_head"))
    with pytest.raises(UserError, match="--lora-targets lm_head"):
        num_trained(CONFIG, lora, trust_remote_code=False)


@pytest.mark.parametrize("precision", Precision)
def test_adapters_are_fp32_except_on_4_bit_weights_in_a_bf16_study(precision: Precision) -> None:
    assert holds_adapter_in_fp32(Method.LORA, precision)
    assert holds_adapter_in_fp32(Method.QLORA, precision) is not precision.has_bf16_weights
