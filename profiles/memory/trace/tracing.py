"""Make a program from a function that runs a step: choose the shapes to trace, and trace them.

This is the interface below `estimate`: another training loop (a published benchmark's, a user's) can be
written as a function of a recorder and a shape, and gets a program in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.memory.program.blocks import Trace
from autosft.profiles.memory.program.program import (
    HEAD_CHUNK_TOKENS,
    NotPolynomial,
    Program,
    Shape,
    compile_program,
)
from autosft.profiles.memory.trace.device_kernels import KERNELS
from autosft.profiles.memory.trace.emulation import Autocast, emulate
from autosft.profiles.memory.trace.liger import liger_losses
from autosft.profiles.memory.trace.recorder import DiffersFromKnown, Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The device that a step is traced for."""

    kind: DeviceKind = DeviceKind.CUDA
    capability: tuple[int, int] = (8, 0)
    autocast_dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A training loop on the meta device.

    `run(recorder, autocast, shape)` runs the whole loop, at least two optimizer steps.  Every part that is to
    be replayed runs within `recorder.segment(name)`, and calls `recorder.enter(phase)` where inputs, forward,
    head and loss backward begin (layers are found by hooks).  What a segment leaves behind (gradients,
    optimizer state, kept outputs) may end in a later one.  `layers` are the repeated blocks of `model`, in
    order; optimizers and inputs are created inside `run`.
    """

    model: torch.nn.Module
    layers: Sequence[torch.nn.Module]
    run: Callable[[Recorder, Autocast, Shape], None]


def trace(loop: Loop, shape: Shape, *, padded: bool, target: Target, known: Trace | None = None) -> Trace:
    """Run the loop once and return its trace.  `padded`: the rows of the batch differ in length.

    `known`: a trace of the loop at another shape, from which the optimizer's part may be copied.
    """
    autocast = Autocast(target.autocast_dtype, target.kind)
    kernels = KERNELS[target.kind]
    # Code that checks whether a row is one sequence looks the same as code that checks for padding.
    recorder = Recorder(scored=shape.scored, padded=padded or shape.is_row, kernels=kernels, known=known)
    with (
        emulate(target.kind, target.capability, autocast),
        liger_losses(target.kind, target.capability, autocast) as liger,
        recorder,
    ):
        recorder.adopt_model(loop.model, loop.layers)
        loop.run(recorder, autocast, shape)
        result = recorder.trace()
    for parameter in loop.model.parameters():
        parameter.grad = None
    return dataclasses.replace(result, only_at_its_shape=liger.is_chunked)


class OnlyAtItsShape(Exception):  # noqa: N818
    """Sizes of a step are step functions of the shape: a trace holds for no other shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A class of shapes for which a step runs the same operators."""

    single: bool  # one row
    padded: bool
    aligned: bool  # length divisible by 8: the efficient kernel does not pad its mask
    many_scored: bool  # more scored tokens than one chunk of the head
    long: bool  # longer than the sliding window
    row: bool = False  # examples packed into one row

    @classmethod
    def of(cls, shape: Shape, *, padded: bool, window: int | None = None) -> Regime:
        return cls(
            single=shape.batch == 1 and not shape.is_row,
            padded=padded,
            aligned=padded and shape.seq % 8 == 0,
            many_scored=shape.scored > HEAD_CHUNK_TOKENS,
            long=window is not None and shape.seq >= window and not shape.is_row,
            row=shape.is_row,
        )


def traced_shapes(
    regime: Regime, *, all_scored: bool, window: int | None = None, chunk: int = 0
) -> list[Shape]:
    """Return shapes of a regime that distinguish all monomials.

    `all_scored`: the head scores all positions, so that the scored tokens follow from the shape.
    """
    batches = [1] * 5 if regime.single else [2, 7, 4, 3, 5]
    lengths = [97, 173, 389, 211, 303]
    if window is not None and not regime.long:
        lengths = [max(8 + i, length * window // 400) for i, length in enumerate(lengths)]
    elif regime.long:
        assert window is not None
        lengths = [window + length for length in lengths]
    rows = [1] * 5 if regime.row else batches
    if all_scored and regime.many_scored:
        lengths = [
            -(-(HEAD_CHUNK_TOKENS + length * 8) // num) for length, num in zip(lengths, rows, strict=True)
        ]
    elif all_scored:
        lengths = [min(length, HEAD_CHUNK_TOKENS // num) for length, num in zip(lengths, rows, strict=True)]
    lengths = [length // 8 * 8 + 8 if regime.aligned else length + (length % 8 == 0) for length in lengths]
    shapes = []
    for index, (batch, seq) in enumerate(zip(batches, lengths, strict=True)):
        scored = [101, 401, 239, 173, 307][index] + (HEAD_CHUNK_TOKENS if regime.many_scored else 0)
        shape = Shape(batch=batch, seq=seq, scored=scored, is_row=regime.row, chunk=chunk)
        shapes.append(dataclasses.replace(shape, scored=shape.num_predicted) if all_scored else shape)
    return shapes


def program_of(
    loop: Loop,
    regime: Regime,
    *,
    target: Target,
    layer_kinds: Sequence[int] | None = None,
    all_scored: bool = False,
    window: int | None = None,
    chunk: int = 0,
) -> Program:
    """Trace a loop at a few shapes and return its program at full depth.

    `layer_kinds[j]` is the traced layer that represents layer j (see `compile_program`); without it, the
    model is at full depth already.  Raises NotPolynomial where shapes or layers differ in more than sizes,
    and OnlyAtItsShape where every shape has to be traced (`program_at`).
    """
    kinds = list(range(len(loop.layers))) if layer_kinds is None else layer_kinds
    shapes = traced_shapes(regime, all_scored=all_scored, window=window, chunk=chunk)
    compiled = functools.partial(compile_program, layer_kinds=kinds, depth=len(loop.layers))
    if program := _program_of_one_step(loop, regime, shapes, target, compiled):
        return program
    traces = []
    for shape in shapes:
        traces.append(trace(loop, shape, padded=regime.padded, target=target))
        if traces[-1].only_at_its_shape:
            raise OnlyAtItsShape
        if len(traces) == 2 and len(traces[0].births) != len(traces[1].births):
            # What a model creates in its first step and keeps (LongRoPE's frequencies) exists by now.
            traces[0] = trace(loop, shapes[0], padded=regime.padded, target=target)
            if len(traces[0].births) != len(traces[1].births):
                raise OnlyAtItsShape  # it runs different operators at each length
    return compiled(traces, shapes)


#: The number of shapes that distinguish single monomials, with two as a check; sums need more.
NUM_FIRST_SHAPES = 3


def _program_of_one_step(
    loop: Loop,
    regime: Regime,
    shapes: Sequence[Shape],
    target: Target,
    compiled: Callable[[Sequence[Trace], Sequence[Shape]], Program],
) -> Program | None:
    """Return the program from traces of a single optimizer step; None if that does not represent later ones.

    The optimizer does not depend on shapes: only the first trace runs it.  Raises OnlyAtItsShape.
    """
    whole = trace(loop, shapes[0], padded=regime.padded, target=target)
    if whole.only_at_its_shape:
        raise OnlyAtItsShape
    known = whole.with_one_step()
    if known is None:
        return None
    traces = [known]
    try:
        for num in (NUM_FIRST_SHAPES, len(shapes)):
            for shape in shapes[len(traces) : num]:
                traces.append(trace(loop, shape, padded=regime.padded, target=target, known=known))
            with contextlib.suppress(NotPolynomial):
                return compiled(traces, shapes[:num])
    except DiffersFromKnown:
        pass
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AtShape:
    """A single shape, as the key of a program."""

    shape: Shape
    padded: bool


def program_at(part: AtShape, loop: Loop, *, target: Target, layer_kinds: Sequence[int]) -> Program:
    """Trace a loop at one shape and return its program at full depth, for that shape only."""
    traced = trace(loop, part.shape, padded=part.padded, target=target)
    return compile_program([traced], [part.shape], layer_kinds=layer_kinds, depth=len(loop.layers))


__all__ = [
    "AtShape",
    "Loop",
    "NotPolynomial",
    "OnlyAtItsShape",
    "Regime",
    "Target",
    "program_at",
    "program_of",
    "trace",
    "traced_shapes",
]
