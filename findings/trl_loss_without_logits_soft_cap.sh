#!/usr/bin/env bash
# trl 1.16.0: SFTTrainer's loss is not the model's for RecurrentGemma.  Its fused head computes log-probabilities
# from the last hidden states and follows `final_logit_softcapping`, `logit_scale`, `logits_scaling` and some more of a
# configuration; RecurrentGemma's cap on its logits is called `logits_soft_cap` and is left out, without a word.  What
# is trained and reported is the loss of another model, further off the larger the logits are.
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
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", bos_token="w1", eos_token="w2")
torch.manual_seed(0)
rows = torch.randint(3, 64, (8, 16)).tolist()


def losses(kind, **sizes):
    """The loss of SFTTrainer's evaluation, and that of the model itself on the same tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **sizes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(60)  # logits as large as a trained model's
    args = SFTConfig(
        output_dir="out", report_to="none", use_cpu=True, bf16=False, max_length=None,
        gradient_checkpointing=False, per_device_eval_batch_size=8,
    )
    data = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    ids = torch.tensor(rows)
    model.eval()
    with torch.no_grad():
        own = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return trainer.evaluate()["eval_loss"], own


print("torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)
seen = {
    "gemma2": losses("gemma2", num_hidden_layers=2, head_dim=16, num_key_value_heads=1),
    "recurrent_gemma": losses("recurrent_gemma", num_hidden_layers=3, lru_width=32, attention_window_size=16),
}
for kind, (trained, own) in seen.items():
    print(f"{kind}: SFTTrainer's eval_loss {trained:.3f}, the model's own loss {own:.3f}")
(first, first_own), (second, second_own) = seen.values()
sys.exit(0 if abs(first - first_own) < 0.01 < 0.2 < abs(second - second_own) else 1)
PY
