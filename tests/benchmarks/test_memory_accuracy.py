"""The accuracy benchmark: what rows say, what bounds learn from, what peers answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boundaries
import memory_accuracy
import pytest
from harnesses import NotPredictable, peft_metamath, predict
from peers import PEERS, ModelSize

ROW: dict[str, Any] = {
    "source": "PEFT method_comparison/MetaMathQA",
    "model_id": "meta-llama/Llama-3.2-3B",
    "method": "lora",
    "lora_r": 32,
    "lora_targets": ["q_proj", "v_proj"],
    "quantization": None,
    "weights_dtype": "bfloat16",
    "per_device_batch": 4,
    "n_gpus": 1,
    "notes": 'experiment=lora--llama-3.2-3B-rank32; peft_config={"r": 32, "lora_alpha": 64}; x=1',
}

ADAPTERS = [
    ("lora--llama-3.2-3B-rank32", {"r": 32, "lora_alpha": 64}, {"peft_type": "LORA", "r": 32}),
    ("lora--llama-3.2-3B-rank32-dora", {"r": 32}, {"peft_type": "LORA", "use_dora": True}),
    ("vera--llama-3.2-3B-default", {}, {"peft_type": "VERA", "r": 256}),
    ("ia3--llama-3.2-3B-default", {}, {"peft_type": "IA3"}),
    ("ptuning--llama-3.2-3B-default", {}, {"peft_type": "P_TUNING", "num_virtual_tokens": 20}),
    ("oft--llama-3.2-3B-rank32", {"r": 16}, {"peft_type": "OFT", "r": 16}),
]


@pytest.mark.parametrize(
    ("experiment", "stated", "expected"), ADAPTERS, ids=[adapter[0] for adapter in ADAPTERS]
)
def test_adapter_is_read_from_the_notes(
    experiment: str, stated: dict[str, Any], expected: dict[str, Any]
) -> None:
    row = ROW | {
        "lora_r": None,
        "lora_targets": None,
        "notes": f"experiment={experiment}; peft_config={json.dumps(stated)}",
    }
    fields = peft_metamath.adapter_fields(row)
    assert fields is not None
    assert {key: fields.get(key) for key in expected} == expected


def test_full_fine_tuning_has_no_adapter() -> None:
    row = ROW | {"method": "full", "notes": "experiment=full-finetuning--llama-3.2-3B-lr_0.00001"}
    assert peft_metamath.adapter_fields(row) is None


def test_rows_that_cannot_be_predicted_say_why() -> None:
    with pytest.raises(NotPredictable, match="BERT"):
        predict(ROW | {"source": "transformers docs"})
    with pytest.raises(NotPredictable, match="not reproduced"):
        predict(ROW | {"source": "somebody's blog"})


def test_unpredicted_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    row = ROW | {"source": "transformers docs", "peak_gb": 14.6, "unit": "GiB"}
    (answer,) = memory_accuracy.judge_rows([row])
    assert answer["predicted_bytes"] is None
    assert "BERT" in answer["reason"]
    assert "BERT" in capsys.readouterr().out


@pytest.mark.parametrize(("unit", "expected"), [("GiB", 2 << 30), ("GB", 2 * 10**9)])
def test_units(unit: str, expected: int) -> None:
    assert memory_accuracy.measured_bytes({"peak_gb": 2.0, "unit": unit}) == expected


BAD_ROWS = [
    ("no JSON", "{broken", "no JSON object"),
    ("a list", "[1]", "no JSON object"),
    ("no model", '{"source": "LitGPT resource tables", "peak_gb": 1, "unit": "GB"}', "missing"),
    ("unknown unit", '{"source": "x", "model_id": "y", "peak_gb": 1, "unit": "Gb"}', "cannot be read"),
    ("no peak", '{"source": "x", "model_id": "y", "peak_gb": null, "unit": "GB"}', "cannot be read"),
    ("unknown source", '{"source": "x", "model_id": "y", "peak_gb": 1, "unit": "GB"}', "not reproduced"),
    (
        "unknown model",
        '{"source": "LitGPT resource tables", "model_id": "no-such-model", "method": "lora", "peak_gb": 1, '
        '"unit": "GB", "per_device_batch": 1, "seq_len": 100}',
        "no-such-model",
    ),
]


@pytest.mark.parametrize(("line", "reason"), [row[1:] for row in BAD_ROWS], ids=[row[0] for row in BAD_ROWS])
def test_a_bad_row_is_listed_and_ends_nothing(line: str, reason: str, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    path.write_text(line + "\n\n" + line + "\n")
    assert memory_accuracy.main(["--rows", str(path), "--json", str(out)]) == 0
    answers = json.loads(out.read_text())
    assert len(answers) == 2
    assert all(reason in answer["reason"] and answer["predicted_bytes"] is None for answer in answers)
    assert memory_accuracy.main(["--boundaries", str(path), "--json", str(out)]) == 0
    assert [load["predicted_fits"] for load in json.loads(out.read_text())] == [None, None]


def test_a_row_is_not_calibrated_by_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ROW | {"lora_r": 64}
    known = [
        {"run": memory_accuracy.run_of(row), "stack": memory_accuracy.stack_of(row),
         "predicted_bytes": 100, "measured_bytes": 100 + index}
        for index, row in enumerate((ROW, ROW | {"versions": "torch 2.7"}, other, ROW | {"n_gpus": 2}))
    ]  # fmt: skip
    monkeypatch.setattr(memory_accuracy, "_known_rows", lambda: known)
    rows = memory_accuracy.calibration_without(ROW).rows
    assert [row.measured_bytes for row in rows] == [102], (
        "neither the row, nor its repetition, nor sharded rows"
    )


SIZE = ModelSize(num_parameters=10**9, largest_layer_parameters=10**8, fp32_bytes=4 * 10**9)
PEER_CASES = [
    ("deepspeed_zero2", {"n_gpus": 1}, 20e9),
    ("deepspeed_zero2", {"n_gpus": 4}, 8e9),
    ("deepspeed_zero3", {"n_gpus": 1}, 18.4e9),
    ("llama_factory", {"method": "full"}, 8e9),
    ("llama_factory", {"method": "lora"}, 2e9),
    ("llama_factory", {"method": "qlora", "quantization": "bnb.nf4"}, 0.5e9),
    ("accelerate", {}, 4e9),  # Adam in bf16: twice the half-precision weights
]


@pytest.mark.parametrize(("peer", "row", "expected"), PEER_CASES)
def test_peers(peer: str, row: dict[str, Any], expected: float) -> None:
    assert PEERS[peer](ROW | row, SIZE) == pytest.approx(expected)


BOUNDARIES = [
    (
        "r8 q,v; micro batch 4; longest 1304 tokens; quant None; 1 GPU no AC",
        "LitGPT resource tables",
        4,
        1304,
    ),
    ("bf16-mixed (fp32 weights) mb1, 1304 tokens", "LitGPT finetune_lora", 1, 1304),
    ("gemma-7b/lora.yaml micro batch 1, max_seq 512, bf16-true", "LitGPT config_hub", 1, 512),
]


@pytest.mark.parametrize(("config", "source", "batch", "length"), BOUNDARIES)
def test_boundary_settings_are_read(config: str, source: str, batch: int, length: int) -> None:
    row = {"source": source, "model_id": "Llama-2-7b", "method": "lora", "config": config,
           "gpu_capacity": "A100 40GB"}  # fmt: skip
    read = boundaries.litgpt_row(row)
    assert (read["per_device_batch"], read["seq_len"]) == (batch, length)
    assert ("mixed" in read["mixed_precision"]) == ("mixed" in config)


CARDS = [("A100 40GB", 38, 40), ("A100 80GB", 78, 80), ("1xA10G (24GB)", 21, 24), ("8GB", 7, 8)]


@pytest.mark.parametrize(("text", "low_gib", "high_gib"), CARDS)
def test_cards(text: str, low_gib: int, high_gib: int) -> None:
    assert low_gib << 30 <= boundaries.card_bytes(text) <= high_gib << 30


@pytest.mark.slow
def test_strict_rows_of_single_gpus_are_within_a_percent(measurements: Path) -> None:
    lines = (measurements / "strict_dev.jsonl").read_text().splitlines()
    rows = [row for line in lines if (row := json.loads(line))["n_gpus"] == 1]
    answers = memory_accuracy.judge_rows(rows)
    for answer in answers:
        assert abs(answer["relative_error"]) < 0.01, answer["what"]
        assert answer["covered"]
