"""The training loop of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA).

What it does, read in its run.py, utils.py, data.py and default_training_params.json: a Llama-3.2-3B in bf16
loaded straight onto the GPU, an adapter whose weights peft casts to fp32, batches of four padded to their
longest, labels for every token, HF's own loss over all positions, torch's AdamW over all parameters, and
`outputs` kept until the next forward pass has replaced them (with `use_cache` at its default, so they hold
keys and values besides the logits).  Examples are sorted from long to short within buckets of 20 batches,
and every 10 steps the cache is emptied.  The peak reserved over the whole run is recorded; evaluation and
generation stay below the longest training batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.allocator.caching_allocator import CachingAllocator
from autosft.profiles.memory.program.blocks import Phase
from autosft.profiles.memory.program.program import NotPolynomial, Program, Shape, compile_program
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.recorder import Recorder
from autosft.profiles.memory.trace.shallow_model import load_config, repeated_layers, shallow_model
from autosft.profiles.memory.trace.tracing import Loop, Regime, Target, program_of, trace
from harnesses.models import config_json
from harnesses.prediction import NotPredictable, Prediction, Row
from harnesses.replayed import EMPTY_CACHE, replay_program

SOURCE = "PEFT method_comparison/MetaMathQA"

#: Tokens of the longest padded batch.  The sources give the cap (768) and the filter (1,300 characters), not
#: the length; it is the one unknown that all rows share, fitted on a single row (lora--llama-3.2-3B-rank32
#: of 2026-07-15) and used for every other.
LONGEST_TOKENS = 702
#: Mean length of a padded batch: what is left of that row's average allocated memory after weights, adapter
#: and optimizer state is 343.6 MB of kept logits, keys and values, at 1.485 MB a token of a batch of four.
MEAN_TOKENS = 231
#: Lengths are drawn from a gamma distribution of that mean, whose shape puts the longest of 20,000 examples
#: (5,000 steps of four) at LONGEST_TOKENS.
GAMMA_SHAPE = 8
BATCHES_PER_BUCKET = 20
STEPS_PER_EMPTY_CACHE = 10
NUM_HISTORIES = 9
#: Where a step has to be traced at each length: an average batch, the end of a bucket, the longest.
FIXED_LENGTHS = (233, 101, LONGEST_TOKENS)

#: The L40S of the source.
TARGET = Target(kind=DeviceKind.CUDA, capability=(8, 9))

#: Directory of an experiment -> peft's PeftType, where the names differ.
_PEFT_TYPES = {"prefixtuning": "PREFIX_TUNING", "ptuning": "P_TUNING", "adaptionprompt": "ADAPTION_PROMPT"}

#: What the experiments' adapter_config.json say beyond the rank: (directory, name part) -> fields.
_EXPERIMENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("adaptionprompt", ""): {"adapter_layers": 28, "adapter_len": 100},
    ("adalora", "rank32"): {"init_r": 64, "target_r": 32, "tinit": 200, "tfinal": 500, "total_step": 5000},
    ("boft", ""): {"boft_block_size": 4, "boft_block_num": 0},
    ("ia3", "all-attn"): {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj", "up_proj"],
        "feedforward_modules": ["down_proj", "gate_proj", "up_proj"],
    },
    ("lora", "dora"): {"use_dora": True},
    ("lora", "rslora"): {"use_rslora": True},
    ("lora", "target-mlp"): {"target_modules": ["down_proj", "gate_proj", "up_proj"]},
    ("lora", "all-linear"): {"target_modules": "all-linear"},
    ("oft", ""): {"r": 32, "oft_block_size": 0, "target_modules": ["q_proj", "v_proj"]},
    ("prefixtuning", ""): {"num_virtual_tokens": 200, "encoder_hidden_size": 3072},
    ("prompt_tuning", ""): {"num_virtual_tokens": 200},
    ("ptuning", ""): {"num_virtual_tokens": 20, "encoder_hidden_size": 3072, "encoder_num_layers": 2},
    ("vera", ""): {"r": 256},
}


def predict(row: Row) -> Prediction:
    """Predict the peaks of one row; raises NotPredictable for adapters that cannot be built from it."""
    if row.get("per_device_batch") is None:
        raise NotPredictable("the batch is not stated")
    if (row.get("grad_accum") or 1) != 1 or row.get("quantization"):
        raise NotPredictable("gradient accumulation and quantization do not occur in this harness")
    batch = int(row["per_device_batch"])
    adapter = json.dumps(adapter_fields(row), sort_keys=True)
    traced = _traced(row["model_id"], adapter, optimizer_of(row), batch)
    peaks = []
    for seed in range(NUM_HISTORIES):
        allocator = traced.replay(seed, batch)
        peaks.append((allocator.peak_reserved_bytes, allocator.peak_allocated_bytes))
    reserved = sorted(reserved for reserved, _ in peaks)
    allocated = sorted(allocated for _, allocated in peaks)
    return Prediction(
        allocated_bytes=allocated[NUM_HISTORIES // 2],
        reserved_bytes=reserved[NUM_HISTORIES // 2],
        num_parameters=traced.num_parameters,
        known_stack=_same_torch(row),
        note=f"longest batch {LONGEST_TOKENS} tokens",
    )


def meta_model(row: Row) -> Any:
    """Return the row's model without an adapter."""
    text = config_json(row["model_id"])
    return _base(load_config(text))


def _same_torch(row: Row) -> bool:
    """Whether the source ran the minor version of torch that was traced."""
    ours = ".".join(torch.__version__.split(".")[:2])
    return f"torch {ours}." in (row.get("versions") or "")


def _history(rng: random.Random, batch: int) -> list[tuple[str, Shape] | str]:
    """The end of one bucket, a whole bucket, and the half bucket that starts with the longest batch.

    The first steps have no optimizer state; what an emptied cache leaves behind depends on the steps
    before it, so a peak needs its history.
    """
    before, bucket, longest = (_bucket(rng, batch) for _ in range(3))
    longest[0] = LONGEST_TOKENS
    lengths: list[int | None] = [
        *before[8:STEPS_PER_EMPTY_CACHE],
        None,
        *bucket[STEPS_PER_EMPTY_CACHE:],
        None,
        *longest[:4],
    ]
    runs: list[tuple[str, Shape] | str] = []
    name = "step first"
    for length in lengths:
        if length is None:
            runs.append(EMPTY_CACHE)
        else:
            runs.append((name, Shape(batch=batch, seq=length, scored=batch * (length - 1))))
            name = "step"
    return runs


def _bucket(rng: random.Random, batch: int) -> list[int]:
    """Padded lengths of a bucket's batches, from long to short."""
    draws = [
        rng.gammavariate(GAMMA_SHAPE, MEAN_TOKENS / GAMMA_SHAPE) for _ in range(BATCHES_PER_BUCKET * batch)
    ]
    lengths = sorted((min(LONGEST_TOKENS, max(40, round(draw))) for draw in draws), reverse=True)
    # a length that is no multiple of 8 keeps to the regime of the longest batch
    return [length + (length % 8 == 0) for length in lengths[::batch]]


def adapter_fields(row: Row) -> dict[str, Any] | None:
    """Return peft's type and fields of a row's adapter, None for full fine-tuning.

    The row's notes have them as `experiment=` and `peft_config=`; what they leave out is peft's default or
    stands in the experiment's own adapter_config.json.
    """
    notes = row.get("notes") or ""
    found = re.search(r"experiment=([\w.\-]+)", notes)
    directory, _, name = (found.group(1) if found else str(row["method"])).partition("--")
    if "full" in directory:
        return None
    fields: dict[str, Any] = {}
    for (experiment, part), values in _EXPERIMENTS.items():
        if experiment == directory and part in name:
            fields |= values
    if row.get("lora_r") is not None:
        fields["r"] = row["lora_r"]
    targets = row.get("lora_targets")
    if isinstance(targets, str) and "," in targets:
        targets = [part.strip() for part in targets.split(",")]
    if isinstance(targets, list) or targets == "all-linear":
        fields["target_modules"] = targets
    start = notes.find("peft_config={")
    if start >= 0:
        stated, _ = json.JSONDecoder().raw_decode(notes, start + len("peft_config="))
        fields |= {key: value for key, value in stated.items() if value is not None}
    if directory in ("dora", "rslora"):
        fields[f"use_{directory}"] = True
        directory = "lora"
    peft_type = str(fields.pop("peft_type", None) or _PEFT_TYPES.get(directory, directory.upper()))
    return {"peft_type": peft_type, **fields}


def optimizer_of(row: Row) -> str:
    """Return "AdamW" or "lora-fa"; raises NotPredictable for others."""
    notes = row.get("notes") or ""
    if "lorafa" in notes or "lora-fa" in notes:
        return "lora-fa"
    if row.get("optimizer") not in (None, "AdamW", "torch.optim.AdamW", "torch AdamW"):
        raise NotPredictable(f"optimizer {row['optimizer']} is not reproduced")
    return "AdamW"


@dataclass(frozen=True, slots=True)
class Traced:
    """A loop's program at every length, or, where its sizes are no polynomials, at a few lengths."""

    program: Program | None
    by_length: Mapping[int, Program]
    weight_bytes: int
    num_parameters: int

    def replay(self, seed: int, batch: int) -> CachingAllocator:
        if self.program is not None:
            runs = _history(random.Random(seed), batch)
            return replay_program(self.program, runs, warm_up_bytes=self.weight_bytes)
        return replay_program(
            self.by_length[LONGEST_TOKENS],
            _fixed_history(batch),
            warm_up_bytes=self.weight_bytes,
            program_at=lambda shape: self.by_length[shape.seq],
        )


@functools.cache
def _traced(model_id: str, adapter: str, optimizer: str, batch: int) -> Traced:
    """Trace the loop: shallow where layers are alike, else at full depth, else at a few lengths."""
    text = config_json(model_id)
    fields = json.loads(adapter)
    full = _base(load_config(text))
    counts = {
        "num_parameters": sum(parameter.numel() for parameter in full.parameters()),
        "weight_bytes": sum(parameter.nbytes for parameter in full.parameters()),
    }
    regime = Regime.of(Shape(batch=2, seq=LONGEST_TOKENS, scored=1), padded=True)
    shallow = shallow_model(text)
    try:
        loop = _loop(_adapted(_base(shallow.config), fields), optimizer)
        program = program_of(loop, regime, target=TARGET, layer_kinds=shallow.layer_kinds)
        traced = Traced(program, {}, **counts)
        traced.replay(0, batch)
        return traced
    except (NotPolynomial, NotPredictable, AssertionError):
        pass  # what layers share, or keep for each other: trace all of them
    loop = _loop(_adapted(full, fields), optimizer)
    with contextlib.suppress(NotPolynomial):
        return Traced(program_of(loop, regime, target=TARGET), {}, **counts)
    by_length = {}
    for length in FIXED_LENGTHS:
        shape = Shape(batch=batch, seq=length, scored=batch * (length - 1))
        recorded = trace(loop, shape, padded=True, target=TARGET)
        kinds = range(len(loop.layers))
        by_length[length] = compile_program([recorded], [shape], layer_kinds=kinds, depth=len(loop.layers))
    return Traced(None, by_length, **counts)


def _fixed_history(batch: int) -> list[tuple[str, Shape] | str]:
    middle, short, longest = FIXED_LENGTHS
    shapes = [
        Shape(batch=batch, seq=length, scored=batch * (length - 1)) for length in (middle, short, longest)
    ]
    return [
        ("step first", shapes[0]),
        ("step", shapes[1]),
        EMPTY_CACHE,
        ("step", shapes[2]),
        ("step", shapes[0]),
    ]


def _base(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def _adapted(base: Any, fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return base
    import peft

    values = dict(fields)
    peft_type = values.pop("peft_type")
    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if peft_type not in peft.PeftType.__members__:
        raise NotPredictable(f"peft has no adapter {peft_type}")
    kind = kinds[peft.PeftType[peft_type]]
    names = kind.__dataclass_fields__
    known = {key: value for key, value in values.items() if key in names}
    try:
        with torch.device("meta"):
            return peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **known))
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise NotPredictable(f"peft cannot build {peft_type} on the meta device: {error}") from error


def _loop(model: Any, optimizer: str) -> Loop:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = repeated_layers(base)
    return Loop(model=model, layers=layers, run=functools.partial(_run, model=model, optimizer=optimizer))


def _run(recorder: Recorder, autocast: Autocast, shape: Shape, *, model: Any, optimizer: str) -> None:  # noqa: ARG001
    """Three steps: without optimizer state, with it, and once more, with all that a step finds."""
    if optimizer == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        stepper = create_lorafa_optimizer(model, r=32, lora_alpha=64, lr=1e-4, weight_decay=0.1)
    else:
        stepper = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None:
        allocator.reset_ipt()  # AdaLoRA's running averages begin with the run
    model.train()
    outputs: Any = None
    for name in ("step first", "step", "step"):
        with recorder.segment(name, Phase.INPUT):
            batch = {
                key: torch.zeros(shape.batch, shape.seq, dtype=torch.long, device="meta")
                for key in ("input_ids", "attention_mask")
            }
            labels = batch["input_ids"].clone()
            stepper.zero_grad()
            recorder.enter(Phase.FORWARD)
            kept = outputs
            outputs = model(**batch, labels=labels, num_items_in_batch=shape.batch * shape.seq)
            recorder.enter(Phase.INPUT)
            del kept  # the assignment above dropped it
            recorder.enter(Phase.LOSS_BACKWARD)
            outputs.loss.backward()
            recorder.mark_gradients(model)
            recorder.enter(Phase.OPTIMIZER)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()
            recorder.mark_optimizer_state(stepper)
            if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
                model.base_model.update_and_allocate(1)
    del outputs
