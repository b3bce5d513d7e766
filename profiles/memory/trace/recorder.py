"""Record the births and deaths of a step's storages while it runs on meta tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autosft.profiles.memory.program.blocks import Birth, Owner, Phase, Segment, Trace
from autosft.profiles.memory.trace.device_kernels import DeviceKernels
from autosft.profiles.memory.trace.operator_memo import call
from autosft.profiles.memory.trace.parts import local_part
from autosft.profiles.memory.trace.trace_errors import where_called

aten = torch.ops.aten


class DiffersFromKnown(Exception):  # noqa: N818
    """A trace has other blocks than the known one, so that nothing can be taken over from it."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records births and deaths of storages on the meta device.

    `scored` is the number of tokens that masks over tokens select.  `padded` is the answer where code reads
    whether a mask is all ones.  Code that looks for infinities finds none.

    The layer of an event is the one whose forward or backward pass is running (found by hooks); in the
    optimizer it is that of the parameter that an operator processes.
    """

    def __init__(
        self, *, scored: int, padded: bool, kernels: DeviceKernels, known: Trace | None = None
    ) -> None:
        """`known`: a trace of the same loop at another shape, whose updates need not be run again."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.scored = scored
        self._is_past_layers = False
        self.padded = padded
        self.kernels = kernels
        self.births: list[Birth] = []
        self.segments: list[Segment] = []
        self.untraced: dict[str, None] = {}
        self.phase = Phase.SETUP
        self.layer: int | None = None
        self._segment = Segment("setup")
        self._live: dict[int, int] = {}  # storage -> block number
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._layer_of: dict[int, int | None] = {}  # block -> layer
        self._num_layers = 0
        self._hooks: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check would take a tenth of the trace's time

    # Called by the traced loop

    @contextlib.contextmanager
    def segment(self, name: str, phase: Phase | None = None) -> Iterator[None]:
        """Record the block as segment `name`, beginning in `phase`."""
        outer, self._segment = self._segment, Segment(name)
        self.segments.append(self._segment)
        outer_phase, self.phase = self.phase, phase or self.phase
        self.layer = None
        try:
            yield
        finally:
            self._segment, self.phase = outer, outer_phase

    def repeat(self, name: str) -> None:
        """Take the segment `name` over from the known trace.  Raises DiffersFromKnown."""
        assert self.known is not None
        segment = self.known.segments[len(self.segments)]
        blocks = sorted(event for event in segment.events if event >= 0)
        if segment.name != name or (blocks and blocks[0] != len(self.births)):
            raise DiffersFromKnown
        for block in blocks:
            self.births.append(self.known.births[block])
            self._layer_of[block] = self.known.births[block].layer
        self.segments.append(segment)

    def drop_gradients(self, model: torch.nn.Module) -> None:
        """Free all gradients unseen: a segment that is repeated has their deaths."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                key = local_part(parameter.grad).untyped_storage()._cdata
                self._live.pop(key, None)
                self._refs.pop(key, None)
                parameter.grad = None

    def enter(self, phase: Phase) -> None:
        """Set the phase of the events that follow."""
        self.phase = phase
        self.layer = None

    def adopt_model(self, model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        """Record parameters and buffers, in the order of `model.to`, and watch the layers."""
        layer_of = {id(module): i for i, layer in enumerate(layers) for module in layer.modules()}
        self._num_layers = len(layers)
        with self.segment("setup", Phase.SETUP):
            for module in model.modules():
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None:
                        self.layer = layer_of.get(id(module))
                        self.note(local_part(tensor), "parameter", owner=Owner.PARAMETER)
        self.layer = None
        self._watch(layers)

    def note(self, tensor: torch.Tensor, operator: str, owner: Owner | None = None) -> None:
        """Record a tensor that was not created by an operator of the trace."""
        self._note(tensor, operator, self.layer, owner)

    def release(self, tensor: torch.Tensor) -> None:
        """Record that the storage of a tensor is about to be emptied, though it stays."""
        key = tensor.untyped_storage()._cdata
        block = self._live.pop(key, None)
        if block is not None:
            del self._refs[key]
            self._death(block)

    def describe(self, tensor: torch.Tensor, operator: str, owner: Owner) -> None:
        """Set the operator and the owner of the block of a tensor."""
        block = self._live.get(tensor.untyped_storage()._cdata)
        if block is not None:
            self.births[block] = dataclasses.replace(self.births[block], operator=operator, owner=owner)

    def mark_gradients(self, model: torch.nn.Module, others: Iterable[torch.Tensor] = ()) -> None:
        """Set the owner of the parameters' `grad`, and of other gradients, to gradients."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._own(local_part(parameter.grad), Owner.GRADIENT)
        for whole in others:
            self._own(whole, Owner.GRADIENT)

    def mark_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the owner of the optimizer's tensors to optimizer state."""
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self._own(value, Owner.OPTIMIZER_STATE)

    def trace(self) -> Trace:
        """Return what was recorded, and remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._refs.clear()
        repeated = () if self.known is None else tuple(map(id, self.known.segments))
        for segment in self.segments:
            if id(segment) not in repeated:
                _settle_deaths(segment)
        return Trace(tuple(self.births), tuple(self.segments), tuple(self.untraced))

    # Called by torch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = self._answer(func, args)
        if answer is not NotImplemented:
            return answer
        result = call(func, args, kwargs)
        if _asks_for_infinity(func, args):
            result.says_infinite = True
        layer = self.layer
        if self.phase is Phase.OPTIMIZER:
            self._note_by_parameter(func, args, result)
        elif isinstance(result, torch.Tensor):
            self._note(result, func.name(), layer)
        elif isinstance(result, (tuple, list)):
            for value in result:
                if isinstance(value, torch.Tensor):
                    self._note(value, func.name(), layer)
        for size in self.kernels.scratch_bytes(func, args):
            self._scratch(size, func.name(), layer)
        return result

    def _answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return an answer where an operator reads values, which meta tensors do not have."""
        if func is aten._local_scalar_dense.default:
            if args[0].device.type != "meta":
                return NotImplemented
            if getattr(args[0], "says_infinite", False):
                return False
            if args[0].dtype is torch.bool:
                return not self.padded
            if args[0].dtype.is_floating_point:
                return 1.0
            # Probably a count that decides a shape: sizes from here on cannot be trusted.
            where = where_called()
            self.untraced[f"a number that is read from a tensor{where and f' in {where}'}"] = None
            return 1
        if func is aten.index.Tensor:
            value, indices = args
            at, mask = next((i, index) for i, index in enumerate(indices) if index is not None)
            if mask.dtype is torch.bool:
                num_rows = self.scored if self._is_of_tokens(value) else mask.numel()
                rows = value.new_empty((*value.shape[:at], num_rows, *value.shape[at + mask.dim() :]))
                self._note(rows, "aten::index.Tensor", self.layer)
                return rows
        return NotImplemented

    def _is_of_tokens(self, value: torch.Tensor) -> bool:
        """Return whether a mask is over tokens; within layers there are masks over an adapter's weights."""
        if self._is_past_layers:  # at the head
            return True
        block = self._live.get(value.untyped_storage()._cdata)
        is_weight = block is not None and self.births[block].owner is Owner.PARAMETER
        return self.layer is None or (value.is_floating_point() and not is_weight)

    def _note_by_parameter(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Attribute the outputs of an optimizer's operator to the layers of its inputs."""
        name = func.name()
        if isinstance(result, torch.Tensor):
            source = next((value for value in args if isinstance(value, torch.Tensor)), None)
            if source is not None and source.device.type == "meta":
                self.layer = self._layer(source)
            elif any(isinstance(value, (list, tuple)) and len(value) > 1 for value in args):
                self.layer = None  # one tensor from many
            self._note(result, name, self.layer)
        elif isinstance(result, (tuple, list)):
            sources = next(
                (value for value in args if isinstance(value, (list, tuple)) and len(value) == len(result)),
                (),
            )
            for index, value in enumerate(result):
                if isinstance(value, torch.Tensor):
                    if index < len(sources):
                        self.layer = self._layer(sources[index])
                    self._note(value, name, self.layer)

    def _layer(self, tensor: torch.Tensor) -> int | None:
        block = self._live.get(tensor.untyped_storage()._cdata)
        return None if block is None else self._layer_of[block]

    def _note(
        self, tensor: torch.Tensor, operator: str, layer: int | None, owner: Owner | None = None
    ) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        if size == 0:
            return
        block = self._birth(size, operator, layer, owner)
        self._live[key] = block

        def died(_: Any) -> None:
            del self._live[key], self._refs[key]
            self._death(block)

        self._refs[key] = weakref.ref(storage, died)

    def _birth(self, size: int, operator: str, layer: int | None, owner: Owner | None = None) -> int:
        block = len(self.births)
        if owner is None:
            owner = _OWNER_BY_PHASE[self.phase]
        self.births.append(Birth(size, operator, self.phase, layer, owner))
        self._layer_of[block] = layer
        self._event(block, layer)
        return block

    def _death(self, block: int) -> None:
        # Outside layers, and in the optimizer, a death belongs to the layer of the birth.
        outside = self.layer is None or self.phase is Phase.OPTIMIZER
        self._event(~block, self._layer_of[block] if outside else self.layer)

    def _event(self, code: int, layer: int | None) -> None:
        segment = self._segment
        segment.events.append(code)
        segment.tags.append(layer)
        segment.phases.append(self.phase)

    def _scratch(self, size: int, operator: str, layer: int | None) -> None:
        block = self._birth(size, operator, layer, Owner.WORKSPACE)
        self._event(~block, layer)

    def _own(self, tensor: torch.Tensor, owner: Owner) -> None:
        block = self._live.get(tensor.untyped_storage()._cdata)
        if block is not None:
            birth = self.births[block]
            if birth.owner is not owner:
                self.births[block] = Birth(birth.size, birth.operator, birth.phase, birth.layer, owner)

    # Which layer is running

    def _watch(self, layers: Sequence[torch.nn.Module]) -> None:
        # Before other hooks: what those of FSDP2 allocate belongs to the layer that they are on.
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(self._before(index), prepend=True))
            self._hooks.append(layer.register_forward_hook(self._after(index), prepend=True))

    def _before(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self.layer = index
            self._is_past_layers = False

        return hook

    def _after(self, index: int) -> Any:
        def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
            self._is_past_layers = index == self._num_layers - 1
            if self._is_past_layers and self.phase is Phase.FORWARD:
                self.phase = Phase.HEAD
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            if tensor.grad_fn is not None:
                tensor.register_hook(self._backward(index))

        return hook

    def _backward(self, index: int) -> Any:
        def prehook(_: Any) -> None:
            self.phase = Phase.LAYER_BACKWARD
            self.layer = index
            self._is_past_layers = False

        return prehook


def _asks_for_infinity(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operator looks for infinities (`x.isinf()`), or reduces such a result."""
    if func in (aten.any.default, aten.any.dim):
        return bool(getattr(args[0], "says_infinite", False))
    return func in (aten.isinf.default, aten.isnan.default)


def _settle_deaths(segment: Segment) -> None:
    """Attribute an optimizer's temporaries of one parameter to the next parameter's layer, where they die.

    The temporaries of a parameter die while the next one is processed.  When blocks of many layers die at
    once (a list of temporaries), their deaths stay with the layers of their births.
    """
    position, before = 0, None
    while position < len(segment.events):
        if segment.events[position] >= 0 or segment.phases[position] is not Phase.OPTIMIZER:
            before = segment.tags[position]
            position += 1
            continue
        stop = position
        while stop < len(segment.events) and segment.events[stop] < 0:
            stop += 1
        after = segment.tags[stop] if stop < len(segment.events) else before
        if position and before == after and len({*segment.tags[position:stop]} - {before}) == 1:
            segment.tags[position:stop] = [before] * (stop - position)
        position = stop


_OWNER_BY_PHASE = {
    Phase.SETUP: Owner.PARAMETER,
    Phase.INPUT: Owner.INPUT,
    Phase.FORWARD: Owner.ACTIVATION,
    Phase.HEAD: Owner.LOGITS,
    Phase.LOSS_BACKWARD: Owner.LOGITS,
    Phase.LAYER_BACKWARD: Owner.ACTIVATION,
    Phase.OPTIMIZER: Owner.WORKSPACE,
    Phase.EVALUATION: Owner.ACTIVATION,
    Phase.GENERATION: Owner.ACTIVATION,  # including the key-value cache
}
