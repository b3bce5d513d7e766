#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0: SFTTrainer cannot train mixture-of-experts models whose configuration counts its
# experts as `num_local_experts` without an alias: Granite MoE, PhiMoE and others.  Their configurations have a
# `router_aux_loss_coef` above 0, so that the routers' auxiliary loss is added, for which the fused head reads
# `num_experts`: the first step ends with an AttributeError.  Mixtral, with an alias for that field, trains.
#
# Prints what was seen; exits 1 where it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>errors.txt || { tail -5 errors.txt; exit 1; }
import sys

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", bos_token="w1", eos_token="w2")
torch.manual_seed(0)
rows = torch.randint(3, 64, (8, 16)).tolist()


def trained(kind, **sizes):
    """What one step of SFTTrainer comes to."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **sizes))
    args = SFTConfig(
        output_dir="out", report_to="none", use_cpu=True, bf16=False, max_length=None, max_steps=1,
        gradient_checkpointing=False, save_strategy="no",
    )
    data = Dataset.from_dict({"input_ids": rows})
    try:
        SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer).train()
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "trains"


print("torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)
seen = {
    "mixtral": trained("mixtral", num_experts_per_tok=2, router_aux_loss_coef=0.001),
    "granitemoe": trained("granitemoe", num_experts_per_tok=2),
    "phimoe": trained("phimoe", num_experts_per_tok=2),
}
for kind, what in seen.items():
    print(f"{kind}: {what}")
good, *others = seen.values()
sys.exit(0 if good == "trains" and all("'num_experts'" in what for what in others) else 1)
PY
