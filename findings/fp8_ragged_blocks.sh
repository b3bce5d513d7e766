#!/usr/bin/env bash
# transformers 5.23.0: FP8 checkpoints with weight_block_size [128, 128], loaded with
# FineGrainedFP8Config(dequantize=True), get wrong weights where a side is no multiple of 128.  The size of a block is
# taken to be the side divided by the number of its scales: 192 rows with two scales (of 128 and 64 rows) are
# dequantized as two blocks of 96, and nothing is said.  Where that does not divide, as for the 576 rows with five
# scales of DeepSeek-V3's kv_a_proj_with_mqa, the load ends with a RuntimeError.
#
# Prints what was seen; exits 1 where it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>errors.txt || { tail -5 errors.txt; exit 1; }
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK = 128


def quantized(weight):
    """Codes, a scale for each block of 128 x 128, and the numbers that they stand for."""
    rows, columns = (-(-side // BLOCK) for side in weight.shape)
    codes, numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scales[row, column] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
            numbers[place] = codes[place].float() * scales[row, column]
    return codes, scales, numbers


def load(name, intermediate_size):
    """A Llama whose down_proj is (128, intermediate_size), with larger values in its last block."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=intermediate_size, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1,
    )).save_pretrained(name)
    stored, numbers = {}, {}
    for key, weight in load_file(f"{name}/model.safetensors").items():
        stored[key] = weight
        if "proj" in key:
            weight[..., BLOCK:] *= 10
            stored[key], stored[f"{key}_scale_inv"], numbers[key] = quantized(weight)
    save_file(stored, f"{name}/model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path(name, "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]
    }
    Path(name, "config.json").write_text(json.dumps(config))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
        )
    except RuntimeError as error:
        return type(error).__name__
    right = numbers["model.layers.0.mlp.down_proj.weight"]
    off = (model.model.layers[0].mlp.down_proj.weight - right).abs().max() / right.abs().max()
    return f"off by {off:.2f} of the largest"


print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {columns: load(f"model{columns}", columns) for columns in (256, 192, 320)}
for columns, what in seen.items():
    print(f"down_proj of 128 x {columns}, {-(-columns // BLOCK)} blocks of up to 128: {what}")
expected = seen[256] == "off by 0.00 of the largest" and seen[192] > "off by 0.05" and seen[320] == "RuntimeError"
sys.exit(0 if expected else 1)
PY
