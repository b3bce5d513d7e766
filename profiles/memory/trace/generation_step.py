"""Trace generation on the meta device, as `workers.scoring.generation` runs it with transformers.

Greedy generation is one forward pass over the prompts and one for each new token; each step copies the
key-value cache of every layer into a longer one.  The prompts' pass and two steps are traced; the steps of a
run are replayed at some of their lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from autosft.profiles.memory.program.blocks import Phase
from autosft.profiles.memory.program.program import CompiledSegment, Program, Shape, compile_program
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.recorder import Recorder
from autosft.profiles.memory.trace.tracing import Loop, Target, trace
from autosft.profiles.recipe import Generation

#: How many of a run's steps are replayed, evenly spaced, including the last.
NUM_REPLAYED_STEPS = 6
#: The traced step is the second one after the prompts.
STEPS_TRACED = 2
# None of these lengths, nor those two steps later, is divisible by 8: attention pads their masks.
_BATCHES: tuple[int, ...] = (2, 3, 5, 4, 7)
_LENGTHS: tuple[int, ...] = (97, 211, 305, 389, 173)


def generation_loop(loop: Loop) -> Loop:
    """Return a loop that generates answers with a training loop's model.

    Segments: "generate prefill" (`shape.seq` tokens a prompt, padded on the left), "generate step" (after
    which `shape.seq + STEPS_TRACED` tokens are in the cache), "generate end".
    """
    model: Any = loop.model
    if hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning:
        model = model.get_base_model()  # a trained prompt only adds some tokens

    def run(recorder: Recorder, autocast: Autocast, shape: Shape) -> None:
        model.eval()
        try:
            with torch.no_grad():
                _generate(recorder, autocast, shape, model)
        finally:
            model.train()

    return dataclasses.replace(loop, run=run)


def generation_program(
    loop: Loop, *, target: Target, layer_kinds: Sequence[int], window: int | None, is_long: bool
) -> Program:
    """Trace generation at a few shapes; `is_long`: beyond the model's sliding `window`."""
    lengths = _LENGTHS
    if window is not None and is_long:
        lengths = tuple(-(-window // 8) * 8 + length for length in lengths)
    elif window is not None:
        lengths = tuple(
            max(9 + i, length * window // 450 // 8 * 8 + 1 + i) for i, length in enumerate(lengths)
        )
    shapes = [Shape(batch=b, seq=s, scored=1) for b, s in zip(_BATCHES, lengths, strict=True)]
    traces = [trace(generation_loop(loop), shape, padded=True, target=target) for shape in shapes]
    program = compile_program(traces, shapes, layer_kinds=layer_kinds, depth=len(loop.layers))
    return _answers_of(program)


def generation_program_at(
    num_tokens: int, loop: Loop, *, target: Target, layer_kinds: Sequence[int]
) -> Program:
    """Trace the answer to one prompt of `num_tokens`; the program holds for that shape only."""
    shape = Shape(batch=1, seq=num_tokens, scored=1)
    traced = trace(generation_loop(loop), shape, padded=True, target=target)
    program = compile_program([traced], [shape], layer_kinds=layer_kinds, depth=len(loop.layers))
    return _answers_of(program)


def _answers_of(program: Program) -> Program:
    return Program(
        {name: segment for name, segment in program.segments.items() if name.startswith("generate")},
        program.untraced,
    )


def segments_of(
    short: Program, long: Program, window: int | None, generation: Generation, batch: int
) -> Iterator[tuple[CompiledSegment, Shape]]:
    """Yield the segments that answer a batch of the longest prompts, from the prompts to the last token."""

    def at(name: str, num_tokens: int) -> tuple[CompiledSegment, Shape]:
        program = long if window is not None and num_tokens >= window else short
        return program.segments[name], Shape(batch=batch, seq=num_tokens, scored=1)

    first, last = generation.prompt_tokens, generation.prompt_tokens + generation.new_tokens
    yield at("generate prefill", first)
    for i in range(1, NUM_REPLAYED_STEPS + 1):
        num_tokens = first + generation.new_tokens * i // NUM_REPLAYED_STEPS
        yield at("generate step", max(1, num_tokens - STEPS_TRACED))
    yield at("generate end", last)


def _generate(recorder: Recorder, autocast: Autocast, shape: Shape, model: Any) -> None:
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    ids = mask = torch.zeros((shape.batch, 0), dtype=torch.long, device="meta")
    with ExitStack() as precision:  # one autocast over all steps, as in `workers.scoring.generation`
        for step in range(STEPS_TRACED + 1):
            name = "generate step" if step else "generate prefill"
            with recorder.segment(name, Phase.INPUT):
                num_new = 1 if step else shape.seq
                new = torch.zeros((shape.batch, num_new), dtype=torch.long, device="meta")
                ones = torch.ones_like(new)
                ids, mask = torch.cat([ids, new], dim=-1), torch.cat([mask, ones], dim=-1)
                recorder.enter(Phase.GENERATION)
                if not step:
                    precision.enter_context(autocast())
                positions = (mask.cumsum(-1) - 1)[:, -num_new:]
                logits = model(
                    input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1,
                ).logits  # fmt: skip
                recorder.enter(Phase.GENERATION)
                scores = logits[:, -1].to(copy=True, dtype=torch.float32)
                chosen = torch.argmax(scores, dim=-1)
                del new, ones, positions, logits, scores, chosen
        with recorder.segment("generate end", Phase.GENERATION):
            del cache, mask, ids
            precision.close()
