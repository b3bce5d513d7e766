#!/usr/bin/env bash
# torch 2.13.0 on a CPU with bf16 instructions: a bf16 matrix product leaves compiled kernels behind for every new number
# of rows, without end. A linear layer of 128 x 256 (64 KiB of weights), forward and backward over 64, 65, 66, ... rows,
# grows the process by 0.5 GiB in 400 steps; over the same number of rows again it does not grow, nor does fp32. With
# ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 (oneDNN keeps nothing, and compiles again) more than half of the growth stays. So a
# fine-tuning run whose micro batches are padded to their own longest example grows by megabytes with each new length.
#
# Seen on an x86-64 CPU with avx512_bf16: 600 to 750 MiB after 400 sizes, 350 to 430 with capacity 0, below 10 for one
# size and for fp32. Prints what was seen; exits 1 where it is otherwise, and says so where the CPU lacks the instructions.
set -euo pipefail
if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
  echo "this CPU has no bf16 instructions: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
cat >grow.py <<'PY'
import sys

import torch

torch.set_num_threads(1)
dtype, step = getattr(torch, sys.argv[1]), int(sys.argv[2])
weight = torch.randn(256, 128).to(dtype).requires_grad_()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20


for number in range(401):
    rows = torch.randn(64 + number * step, 128).to(dtype).requires_grad_()
    torch.nn.functional.linear(rows, weight).sum().backward()
    weight.grad = None
    if number == 0:
        first = resident()
print(resident() - first)
PY
run() { "$folder/venv/bin/python" grow.py "$@" 2>errors.txt || { tail -5 errors.txt >&2; exit 1; }; }
many=$(run bfloat16 1)
one=$(run bfloat16 0)
fp32=$(run float32 1)
uncached=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 run bfloat16 1)
echo "torch 2.13.0, MiB grown over 400 steps: bf16, 400 sizes $many (without oneDNN's cache $uncached); one size $one; fp32, 400 sizes $fp32"
[ "$many" -gt 300 ] && [ "$uncached" -gt 150 ] && [ "$one" -lt 30 ] && [ "$fp32" -lt 30 ]
