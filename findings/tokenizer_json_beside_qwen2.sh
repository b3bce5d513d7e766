#!/usr/bin/env bash
# transformers 5.23.0: beside a config.json with model_type qwen2, AutoTokenizer takes no more than vocabulary and
# merges from a folder's tokenizer.json; normalizer and word splitting are Qwen's.  The same text gets other ids than
# the file gives it, nothing is said, and save_pretrained writes the other tokenizer.json.  The class that
# tokenizer_config.json names (PreTrainedTokenizerFast) is not used either; beside llama it is.
#
# Prints what was seen; exits 1 where it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "In 2026 IT is 12345."
raw = Tokenizer(models.BPE())
raw.normalizer = normalizers.Lowercase()
raw.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
raw.decoder = decoders.ByteLevel()
raw.train_from_iterator(
    [TEXT] * 50,
    trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
)
fast = PreTrainedTokenizerFast(tokenizer_object=raw)
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
seen = {}
for kind in ("llama", "qwen2"):
    fast.save_pretrained(kind)
    Path(kind, "config.json").write_text(json.dumps({"model_type": kind}))
    told = json.loads(Path(kind, "tokenizer_config.json").read_text())
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    Path(kind, "tokenizer_config.json").write_text(json.dumps(told))
    loaded = AutoTokenizer.from_pretrained(kind)
    of_file = Tokenizer.from_file(f"{kind}/tokenizer.json").encode(TEXT).ids
    ids = loaded(TEXT, add_special_tokens=False)["input_ids"]
    loaded.save_pretrained(f"{kind}-saved")
    saved = Tokenizer.from_file(f"{kind}-saved/tokenizer.json").encode(TEXT).ids
    seen[kind] = (ids == of_file, saved == of_file)
    print(f"beside {kind}: {type(loaded).__name__}, ids {'as' if ids == of_file else 'not as'} in the file "
          f"({len(ids)} and {len(of_file)} tokens), saved again {'the same' if saved == of_file else 'as another one'}")
sys.exit(0 if seen == {"llama": (True, True), "qwen2": (False, False)} else 1)
PY
