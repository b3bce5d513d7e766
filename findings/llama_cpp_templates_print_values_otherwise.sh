#!/usr/bin/env bash
# llama.cpp of xllamacpp 2026.10.11549 renders chat templates with a jinja of its own: lists are printed run together, a
# dict and None as nothing, `length` counts bytes, slices cut characters in half, upper leaves non-ASCII letters, tojson
# keeps the order of keys and drops ".0"; nothing is said.  A template with // keeps the whole model from loading.
#
# Prints what was seen beside Jinja2's; exits 1 where it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 jinja2==3.1.6
cd "$folder"
cat > render.py <<'PY'
import json
import sys
import urllib.request

import gguf
import numpy
import xllamacpp

template = sys.argv[1]
names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_context_length(128)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(32)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(["a", "b", "<end>"])
writer.add_token_types([1, 1, 3])
writer.add_token_merges(["a b"])
writer.add_eos_token_id(2)
writer.add_chat_template(template)
square, vector = numpy.zeros((32, 32), numpy.float32), numpy.ones(32, numpy.float32)
writer.add_tensor("token_embd.weight", numpy.zeros((3, 32), numpy.float32))
writer.add_tensor("output_norm.weight", vector)
for name in ("attn_norm", "ffn_norm"):
    writer.add_tensor(f"blk.0.{name}.weight", vector)
for name in names:
    writer.add_tensor(f"blk.0.{name}.weight", square)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.port, params.warmup, params.use_jinja = "model.gguf", 128, 0, False, True
server = xllamacpp.Server(params)
request = urllib.request.Request(
    server.listening_address + "/apply-template",
    json.dumps({"messages": [{"role": "user", "content": "é"}]}).encode(),
    {"Content-Type": "application/json"},
)
print(json.dumps(json.load(urllib.request.urlopen(request))["prompt"]))
PY
cat > compare.py <<'PY'
import json
import subprocess
import sys
from importlib.metadata import version

from jinja2 import Environment

EXPECTED = {
    "{{ [1, 2] }}": ("12", "[1, 2]"),
    "{{ {'a': 1} }}": ("", "{'a': 1}"),
    "{{ none }}": ("", "None"),
    "{{ 'é' | length }}": ("2", "1"),
    "{{ 'äöü'[0:2] }}": ("ä", "äö"),
    "{{ 'é' | upper }}": ("é", "É"),
    "{{ {'b': 1, 'a': 1.0} | tojson }}": ('{"b": 1, "a": 1}', '{"a": 1.0, "b": 1}'),
    "{{ 7 // 2 }}": (None, "3"),
}
print(f"xllamacpp {version('xllamacpp')}, Jinja2 {version('jinja2')}")
is_as_seen = True
for expression, (seen, right) in EXPECTED.items():
    template = "{{ messages[0].content }}|" + expression
    done = subprocess.run([sys.executable, "render.py", template], capture_output=True, text=True)
    got = json.loads(done.stdout.splitlines()[-1]).split("|", 1)[1] if done.returncode == 0 else None
    wanted = Environment().from_string(template).render(messages=[{"content": "é"}]).split("|", 1)[1]
    print(f"{expression}: llama.cpp {'does not load the model' if got is None else repr(got)}, Jinja2 {wanted!r}")
    is_as_seen &= (got, wanted) == (seen, right)
sys.exit(0 if is_as_seen else 1)
PY
"$folder/venv/bin/python" compare.py
