"""`autosft plan` as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from autosft import cli
from autosft.commands import plan as plan_command
from autosft.profiles.optimizers import OPTIMIZERS
from autosft.profiles.recipe import ByteRange, MemoryEstimate, Sharding
from autosft.scheduler.decide import cost_models
from autosft.scheduler.plan import asked
from autosft.ui import plan_view
from tests.profiles.dataset.small_tokenizer import facts_of, tokenizer_for
from tests.profiles.memory.models import config_json

GIB = 1 << 30
MEMORY = MemoryEstimate(
    allocated=ByteRange(median_bytes=10 * GIB, upper_bytes=11 * GIB),
    need=ByteRange(median_bytes=11 * GIB, upper_bytes=13 * GIB),
    uncapped=ByteRange(median_bytes=20 * GIB, upper_bytes=21 * GIB),
    outside_bytes=GIB,
    components=(("parameters", 6 * GIB), ("activations", 4 * GIB)),
    peak_phase="forward",
    peak_owner="the parameters",
    method="made up",
    bound_level=0.9,
    num_calibration_rows=0,
    untraced=(),
    phases=(("forward", 9 * GIB), ("evaluation", 2 * GIB)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few thousand parameters without weights or tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = {**json.loads(config_json(num_hidden_layers=2)), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


@pytest.fixture(autouse=True)
def cache_dirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path | None]:
    """Put a formula in the place of the memory model; return the folders that it was given for its traces."""
    given: list[Path | None] = []

    def formula(
        model, recipe, micro_batch, lengths, device, *, calibration=None, cache_dir=None, evaluation=None
    ):
        given.append(cache_dir)
        need = GIB + micro_batch * lengths.longest * (1 << 16)
        return replace(
            MEMORY,
            need=ByteRange(median_bytes=need, upper_bytes=need + GIB),
            outside_bytes=device.context_bytes,
        )

    monkeypatch.setattr(cost_models, "estimate", formula)
    for name in ("CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path))
    return given


def run(*arguments: object) -> int:
    return cli.main(["plan", *(str(argument) for argument in arguments)])


def test_a_plan_shows_memory_speed_and_every_method(model, capsys):
    assert run("--model", model, "--hardware", "RTX 3090", "--effective-batch-size", 4) == 0
    out = capsys.readouterr().out
    assert "examples are assumed, all of 512 tokens" in out
    assert "RTX-3090 (assumed idle, not found here)" in out
    for words in ("full", "lora", "qlora", "tokens/s", "at most", "Compared", "2 GPUs", "4 GPUs", "saved"):
        assert words in out
    assert "calculated, not measured" in out
    assert "by phase: forward 9.0 GiB, evaluation 2.0 GiB" in " ".join(out.split())


def test_another_adapter_is_planned_for_by_its_own_count(model, capsys):
    given = ("--model", model, "--hardware", "RTX 3090", "--seq-len", 64)
    assert run(*given, "--adapter", "prompt_tuning,num_virtual_tokens=8") == 0
    out = capsys.readouterr().out
    assert "prompt_tuning, num_virtual_tokens 8, 512 trained" in out  # 8 tokens of 64 numbers
    assert "qlora" not in out
    assert run(*given, "--adapter", "prompt_tuning", "--method", "qlora") == 2
    assert run(*given, "--adapter", "xlora") == 2
    assert "mixes LoRA adapters that are trained already" in capsys.readouterr().err


def test_each_method_is_shown_before_the_next_is_planned(model, capsys, monkeypatch):
    usual, printed = asked.plan_method, []

    def noted(settings, *others, **named):
        printed.append((settings.method.value, capsys.readouterr().out))
        return usual(settings, *others, **named)

    monkeypatch.setattr(asked, "plan_method", noted)
    assert run("--model", model, "--hardware", "RTX 3090", "--seq-len", 64) == 0
    assert [method for method, _ in printed] == ["full", "lora", "qlora"]
    heading, full, lora = (out for _, out in printed)
    assert "to use of 24.0 GiB" in heading
    assert "full  bf16" in full
    assert "lora  bf16" in lora


def test_json_holds_the_whole_plan(model, capsys):
    assert run("--model", model, "--hardware", "RTX 3090", "--method", "lora", "--seq-len", 64, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    [lora] = plan["methods"]
    assert (lora["method"], plan["seq_len"], plan["data"]) == ("lora", 64, None)
    assert lora["chosen"] in lora["front"]
    way = lora["chosen"]
    assert way["memory"]["need"]["median_bytes"] <= way["memory"]["need"]["upper_bytes"] < 24 * GIB
    assert [item["num_devices"] for item in lora["by_num_devices"]] == [1, 2, 4]


def test_several_devices_are_planned_for_together(model, capsys, monkeypatch):
    given = ("--model", model, "--method", "full", "--seq-len", 512, "--effective-batch-size", 4)
    assert run(*given, "--hardware", "2xRTX 3090") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 x RTX-3090 (assumed idle, not found here): 23.3 GiB to use of 24.0 GiB each" in out
    assert "A study runs a trial on each of the 2, at the same time." in out
    assert "One trial over both (" in out
    assert "4 GPUs" not in out
    monkeypatch.setattr(cost_models, "estimate", partial(split_fits, cost_models.estimate))
    assert run(*given, "--hardware", "3xRTX 3090", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    [full] = plan["methods"]
    assert plan["num_devices"] == 3
    assert [item["num_devices"] for item in full["by_num_devices"]] == [1, 2, 3]
    assert (full["chosen"], full["together"]["num_devices"], full["remedies"]) == (None, 2, [])
    assert run(*given, "--hardware", "2xRTX 3090") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "more than there is. One trial over both (FSDP)" in out
    assert "would fit" not in out


def split_fits(formula, model, recipe, *arguments, **options):
    """Only shards fit."""
    memory = formula(model, recipe, *arguments, **options)
    more = 0 if recipe.sharding is Sharding.FSDP else 25 * GIB
    need = ByteRange(median_bytes=memory.need.median_bytes + more, upper_bytes=memory.need.upper_bytes + more)
    return replace(memory, need=need)


def test_a_size_is_planned_for_the_card_with_the_least_memory(model, capsys):
    assert run("--model", model, "--hardware", "24GB", "--method", "lora", "--seq-len", 64) == 0
    out = capsys.readouterr().out
    assert "24 GB: planned for A10G" in out


def test_which_gpus_can_run_it(model, capsys):
    assert run("--model", model, "--what-gpu", "--method", "lora", "--seq-len", 64, "--json") == 0
    devices = json.loads(capsys.readouterr().out)["devices"]
    sizes = [device["usable_bytes"] for device in devices]
    assert sizes == sorted(sizes)
    assert all(device["fits"] for device in devices)
    assert run("--model", model, "--what-gpu", "--method", "lora", "--seq-len", 64, "--quiet") == 0
    assert "RTX-3050-Laptop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "sparser"], "--method sparser"),
        (["--seq-len", "513"], "--seq-len 513 is above 512"),
        (["--epochs", "0"], "--epochs 0"),
        (["--hardware", "RTX 3091"], "Nearest: RTX-3090"),
        (["--effective-batch-size", "40000"], "above 30,000"),
    ],
)
def test_a_wrong_request_is_one_message(model, capsys, arguments, words):
    assert run("--model", model, *arguments) == 2
    assert words in capsys.readouterr().err


def test_data_gives_its_true_lengths_and_what_shorter_ones_would_cut(tmp_path, model, capsys):
    folder, chats = tmp_path / "with tokenizer", tmp_path / "chats.jsonl"
    shutil.copytree(model, folder)
    tokenizer_for(facts_of("Qwen 2.5")).save_pretrained(folder)  # no weights: a plan needs none
    records = [
        {
            "messages": [
                {"role": "user", "content": "Count."},
                {"role": "assistant", "content": "one two three " * number},
            ]
        }
        for number in range(2, 42)
    ]
    chats.write_text("\n".join(json.dumps(record) for record in records))
    arguments = ("--model", folder, "--data", chats, "--hardware", "T4", "--method", "full")
    assert run(*arguments, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    shares = {cut["seq_len"]: cut["truncated_share"] for cut in plan["truncation"]}
    assert shares[plan["seq_len"]] == 0.0
    assert max(shares.values()) > 0.0
    assert run(*arguments, "--seq-len", min(shares)) == 0
    out = capsys.readouterr().out
    assert "examples are assumed" not in out
    assert "training and evaluations" in out
    assert run("--model", model, "--data", chats, "--hardware", "T4") == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_nothing_is_cut_off_in_a_narrow_terminal(model, capsys, monkeypatch):
    for width in (80, 120):
        monkeypatch.setattr(
            plan_command, "plan_console", lambda width=width: Console(width=width, markup=False)
        )
        assert run("--model", model, "--hardware", "2xT4", "--effective-batch-size", 4) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width
        assert "…" not in out


def test_traces_are_kept_unless_that_is_not_wanted(model, tmp_path, cache_dirs):
    arguments = ("--model", model, "--hardware", "T4", "--method", "full", "--seq-len", 64, "--quiet")
    assert run(*arguments) == 0
    assert set(cache_dirs) == {tmp_path / "autosft" / "memory"}
    cache_dirs.clear()
    assert run(*arguments, "--no-cache") == 0
    assert set(cache_dirs) == {None}


def test_what_does_not_fit_comes_with_what_would(model, capsys, monkeypatch):
    assert run("--model", model, "--hardware", "T4", "--method", "full", "--effective-batch-size", 4) == 0
    assert "does not fit" not in capsys.readouterr().out
    huge = ("--model", model, "--hardware", "T4", "--method", "full", "--seq-len", 512)
    monkeypatch.setattr(cost_models, "estimate", partial(too_much, cost_models.estimate))
    assert run(*huge, "--effective-batch-size", 4) == 0
    out = capsys.readouterr().out
    for words in ("does not fit", "would fit:", "--method lora", "--hardware RTX-A4500"):
        assert words in out


def too_much(formula, model, recipe, *arguments, **options):
    """Full fine-tuning needs 16 GiB more."""
    memory = formula(model, recipe, *arguments, **options)
    more = 0 if recipe.adapter is not None else 16 * GIB
    need = ByteRange(median_bytes=memory.need.median_bytes + more, upper_bytes=memory.need.upper_bytes + more)
    return replace(memory, need=need)


@pytest.mark.parametrize(
    ("name", "budget_gib", "expected"),
    [
        ("fits", 20, "PPPPPPAAAAFC++······"),
        ("fits exactly", 14, "PPPPPPAAAAFC++"),
        ("does not fit", 10, "PPPPPPAAAAFC++"),
    ],
)
def test_a_bar_shows_every_part_and_what_is_left(name, budget_gib, expected):
    out = StringIO()
    width = max(budget_gib, 14)
    Console(file=out, width=200).print(plan_view.memory_bar(MEMORY, budget_gib * GIB, width))
    bar, *legend = out.getvalue().splitlines()
    assert bar.rstrip() == expected
    assert "P parameters 6.0 GiB" in " ".join(legend)
    assert "+ margin 2.0 GiB" in " ".join(legend)


def test_parts_of_a_bar_add_up_to_what_must_be_free():
    assert sum(plan_view.bar_sizes(MEMORY).values()) == MEMORY.total_bytes


def test_the_command_is_found_without_torch():
    program = "import sys, autosft.commands.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("word", ["help", "?"])
def test_the_optimizers_are_listed_without_a_model(word, capsys):
    assert run("--optimizer", word) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in OPTIMIZERS)
    assert "torch-optimi" in out


def test_a_plan_takes_an_optimizer(model, capsys):
    given = ("--model", model, "--hardware", "RTX 3090", "--method", "full", "--seq-len", 64)
    assert run(*given, "--optimizer", "adafactor") == 0
    assert ", adafactor, 3 epochs" in capsys.readouterr().out
    assert run(*given, "--optimizer", "adamw_troch") == 2
    err = capsys.readouterr().err
    assert "Did you mean adamw_torch?" in err
    assert "paged_adamw_8bit" in err  # the others are listed
    assert run(*given, "--optimizer", "lomo") == 2
    assert "Use --optimizer adafactor" in " ".join(capsys.readouterr().err.split())


CHANGES = {
    "precision": (("--method", "full", "--precision", "bf16"), "full  bf16, "),
    "optimizer and precision": (
        ("--method", "full", "--precision", "bf16-stochastic", "--optimizer", "adamw_torch_8bit"),
        "full  bf16-stochastic, ",
    ),
    "a lean way": (("--method", "full", "--memory", "lean"), "full --memory lean  bf16-stochastic, "),
    "all ways": (("--method", "full", "--memory", "auto"), "Recommended for full: --memory exact"),
    "LoRA's rank": (("--method", "lora", "--lora-rank", 2), "rank 2 on all-linear"),
    "LoRA's targets": (("--method", "lora", "--lora-targets", "q_proj,v_proj"), "rank 16 on q_proj"),
    "several GPUs": (("--method", "full", "--num-gpus", 2), "2 x RTX-3090"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_answer_is_taken(name, model, capsys):
    given, words = CHANGES[name]
    where = ("--model", model, "--hardware", "RTX 3090", "--seq-len", 64, "--effective-batch-size", 4)
    assert run(*where, *given) == 0
    out = capsys.readouterr().out
    assert words in out, out
    assert run(*where, *given[:2]) == 0
    assert capsys.readouterr().out != out


REFUSED = {
    "a lean way and a precision": (
        ("--memory", "lean", "--precision", "fp32"),
        "--memory lean and --precision",
    ),
    "a lean way and an optimizer": (
        ("--memory", "auto", "--optimizer", "sgd"),
        "--memory auto and --optimizer",
    ),
    "a lean way of adapters": (("--method", "lora", "--memory", "lean"), "adapters are small"),
    "LoRA's rank of full": (("--method", "full", "--lora-rank", 2), "trains no adapter"),
    "a rank that IA3 lacks": (("--method", "lora", "--adapter", "ia3", "--lora-rank", 2), "has no lora_rank"),
    "targets that are not there": (("--method", "lora", "--lora-targets", "nothing"), "nothing"),
    "more CPUs than there are": (("--hardware", "cpu", "--num-gpus", 3), "--num-gpus 3: there are 1"),
    "adapters in bf16-stochastic": (
        ("--method", "lora", "--precision", "bf16-stochastic"),
        "trains adapters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name, model, capsys):
    given, words = REFUSED[name]
    where = ("--model", model, "--hardware", "RTX 3090", "--seq-len", 64, "--effective-batch-size", 4)
    assert run(*where, *given) == 2
    assert words in " ".join(capsys.readouterr().err.split())
