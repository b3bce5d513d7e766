"""Cache the programs of our trainer's step, in this process and on disk; trace them on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.program.disk_cache import load_program, program_path, save_program
from autosft.profiles.memory.program.program import NotPolynomial, NotRepeated, Program
from autosft.profiles.memory.trace.trace_errors import Untraceable, untraceable
from autosft.profiles.optimizers import OPTIMIZERS
from autosft.profiles.recipe import Generation, Method, Sharding, StepRecipe
from autosft.profiles.user_code import missing_extra

TRACED_PACKAGES = ("torch", "transformers", "trl", "peft")


@functools.cache
def versions() -> str:
    """Return the versions of the packages that determine what a step does."""
    return " ".join(f"{name}=={_version(name)}" for name in TRACED_PACKAGES)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def step_programs(
    config_json: str,
    recipe: StepRecipe,
    kind: DeviceKind,
    capability: tuple[int, int] | None,
    *,
    trusted: bool,
    cache_dir: Path | None,
) -> StepPrograms:
    """Return the programs of a recipe, with FSDP those of one rank; what replicas and further accumulation
    add is not part of them.

    Compute capabilities with the same kernels share a trace.
    """
    is_rank = recipe.traces_shards
    traced = dataclasses.replace(
        recipe,
        method=Method.FULL if recipe.method is Method.SPARSE else recipe.method,
        sharding=Sharding.FSDP if is_rank else Sharding.NONE,
        data_parallel=recipe.data_parallel if is_rank else 1,
        gradient_accumulation=min(recipe.gradient_accumulation, 2),
        sorts_steps=False,
        order=None,
        max_rounds=None,
        eval_micro_batch=None,
        eval_seq_len=None,
        generation=None,
    )
    traced_capability = kind.traits.traced_capability(capability)
    return _step_programs(config_json, traced, kind, traced_capability, trusted=trusted, cache_dir=cache_dir)


@functools.lru_cache(maxsize=64)
def _step_programs(
    config_json: str,
    recipe: StepRecipe,
    kind: DeviceKind,
    capability: tuple[int, int] | None,
    *,
    trusted: bool,
    cache_dir: Path | None,
) -> StepPrograms:
    return StepPrograms(config_json, recipe, kind, capability, trusted, cache_dir)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The key of a program that answers prompts; training steps have a `Regime` as their key."""

    is_long: bool  # beyond the sliding window
    num_tokens: int | None = None  # of the only prompt that the program is for; None: any


@dataclass(slots=True)
class StepPrograms:
    """The programs of one recipe: its step in each regime, and its generation."""

    config_json: str
    recipe: StepRecipe
    kind: DeviceKind
    capability: tuple[int, int] | None
    trusted: bool
    cache_dir: Path | None
    _made: dict[Any, Program] = field(default_factory=dict)
    _shallow: Any = None
    _loop: Any = None
    _only_at_shapes: bool = False  # no polynomial holds, so that each shape is traced

    @property
    def follows_rules(self) -> bool:
        """Whether one program covers many shapes; known after the first call of `for_batch`."""
        return not self._only_at_shapes

    @property
    def scores_all(self) -> bool:
        """Whether the head scores all positions, not only those with labels."""
        return self.recipe.has_full_logits

    @property
    def num_layers(self) -> tuple[int, int]:
        """The number of traced layers, and of all layers."""
        self._load()
        kinds = self._shallow.layer_kinds
        return len({*kinds}), len(kinds)

    def for_batch(self, batch: Batch) -> Program:
        """Return the program that covers a batch.  Raises Untraceable."""
        from autosft.profiles.memory.trace.tracing import AtShape, OnlyAtItsShape, Regime

        regime = Regime.of(batch.shape, padded=batch.padded, window=self._window())
        at_shape = AtShape(shape=batch.shape, padded=batch.padded)
        if not self._only_at_shapes and regime not in self._made:
            path = self._path(at_shape)  # an earlier process may have found that no polynomial holds
            self._only_at_shapes = path is not None and path.exists()
        if not self._only_at_shapes:
            try:
                return self._kept(regime)
            except (OnlyAtItsShape, NotPolynomial):
                self._only_at_shapes = True
        return self._kept(at_shape)

    def for_generation(self, generation: Generation) -> tuple[Program, Program, int | None]:
        """Return the programs that answer prompts within and beyond the sliding window, and the window.

        Where no polynomial describes the pass over the prompts, both are a program of prompts as long as
        prompt and answer together, which need at least as much.  Raises Untraceable.
        """
        if self.recipe.traces_shards:  # what it gathers is added to its programs (`sharding.sharded`)
            whole = dataclasses.replace(self.recipe, sharding=Sharding.NONE, data_parallel=1)
            return _step_programs(
                self.config_json,
                whole,
                self.kind,
                self.capability,
                trusted=self.trusted,
                cache_dir=self.cache_dir,
            ).for_generation(generation)
        window = self._window()
        if not self._only_at_shapes:
            try:
                short, long = (
                    self._kept(Answers(is_long=is_long)) for is_long in (False, window is not None)
                )
            except NotPolynomial:
                self._only_at_shapes = True
            else:
                return short, long, window
        num_tokens = generation.prompt_tokens + generation.new_tokens
        program = self._kept(Answers(is_long=False, num_tokens=num_tokens))
        return program, program, None

    def _kept(self, part: Any) -> Program:
        if part not in self._made:
            with _TRACING, _quietly():
                return self._program_of(part)
        return self._made[part]

    def _program_of(self, part: Any) -> Program:
        if part not in self._made:
            self._made[part] = self._stored(part) or self._of_accumulation(part) or self._make(part)
        return self._made[part]

    def _of_accumulation(self, part: Any) -> Program | None:
        """Return the program of the same step with accumulation, which plans will need anyway.

        It contains all segments of a step without accumulation, and the passes that add to gradients.
        """
        if self.recipe.gradient_accumulation > 1 or self.recipe.trainer is not None:
            return None
        if self.recipe.traces_shards:
            return None  # gradients are reduced after the last micro batch only
        recipe = dataclasses.replace(self.recipe, gradient_accumulation=2)
        other = _step_programs(
            self.config_json,
            recipe,
            self.kind,
            self.capability,
            trusted=self.trusted,
            cache_dir=self.cache_dir,
        )
        if other._shallow is None:
            other._shallow = self._shallow
        program = other._program_of(part)
        self._shallow = other._shallow  # the full depth, where a few layers do not stand for all
        return program if _ends_without_adding(program) else None

    def _path(self, part: Any) -> Path | None:
        # Remote code of the model is not part of the key, so its programs are not stored.
        if self.cache_dir is None or self.trusted:
            return None
        row = OPTIMIZERS.get(self.recipe.optimizer)
        modelled = row.modelled_as if row is not None and row.package else ()  # by no version of a package
        return program_path(
            self.cache_dir,
            self.config_json,
            self.recipe,
            self.kind,
            self.capability,
            part,
            versions(),
            *modelled,
        )

    def _stored(self, part: Any) -> Program | None:
        path = self._path(part)
        return None if path is None else load_program(path)

    def as_scored(self, batch: Batch) -> Batch:
        """Return a batch with its chunks and the positions that trl's head scores (see `scores_all`)."""
        shape = dataclasses.replace(batch.shape, chunk=self.chunk)
        if self.scores_all:
            shape = dataclasses.replace(shape, scored=shape.num_predicted)
        return dataclasses.replace(batch, shape=shape)

    @property
    def chunk(self) -> int:
        """The chunk size of state-space layers in tokens; 0 without such layers."""
        self._load()
        size: int = self._shallow.chunk
        return size

    def _window(self) -> int | None:
        self._load()
        window: int | None = self._shallow.window
        return window

    def _load(self) -> None:
        if self._shallow is not None:
            return
        from autosft.profiles.memory.trace.shallow_model import shallow_model

        try:
            with _TRACING, _quietly():
                self._shallow = shallow_model(self.config_json, trust_remote_code=self.trusted)
        except Exception as error:
            raise untraceable(error, self.recipe) from error

    def _make(self, part: Any) -> Program:
        program = self._trace(part)
        path = self._path(part)
        if path is not None:
            save_program(path, program)
        return program

    def _trace(self, part: Any) -> Program:
        """Trace a few representative layers, or the full depth where that fails.

        Raises NotPolynomial where one program cannot cover all shapes.
        """
        from autosft.profiles.memory.trace.shallow_model import full_model
        from autosft.profiles.memory.trace.tracing import OnlyAtItsShape

        is_full = len(self._shallow.layer_kinds) == len({*self._shallow.layer_kinds})
        try:
            try:
                return self._program(part)
            except (UserError, OnlyAtItsShape):
                raise
            except Exception as error:
                # Layers that share state, or that do not run without the others.
                follows_no_rule = isinstance(error, NotPolynomial) and not isinstance(error, NotRepeated)
                if is_full or follows_no_rule:
                    raise
            self._loop = None
            self._shallow = full_model(self.config_json, trust_remote_code=self.trusted)
            return self._program(part)
        except (UserError, OnlyAtItsShape):
            raise
        except Exception as error:
            if isinstance(error, NotPolynomial) and not _is_one_shape(part):
                raise
            if missing := missing_extra(error, "a step of your code"):
                raise missing from error
            raise untraceable(error, self.recipe) from error

    def _program(self, part: Any) -> Program:
        from autosft.profiles.memory.trace import trainer_step
        from autosft.profiles.memory.trace.generation_step import generation_program, generation_program_at
        from autosft.profiles.memory.trace.tracing import AtShape, program_at, program_of

        if self._loop is None:
            self._loop = trainer_step.trainer_loop(
                self._shallow.config, self.recipe, self.kind, trust_remote_code=self.trusted
            )
        target = trainer_step.target_of(self.recipe, self.kind, self.capability)
        kinds, window = self._shallow.layer_kinds, self._shallow.window
        if isinstance(part, Answers) and part.num_tokens is not None:
            return generation_program_at(part.num_tokens, self._loop, target=target, layer_kinds=kinds)
        if isinstance(part, Answers):
            return generation_program(
                self._loop, target=target, layer_kinds=kinds, window=window, is_long=part.is_long
            )
        if isinstance(part, AtShape):
            return program_at(part, self._loop, target=target, layer_kinds=kinds)
        return program_of(
            self._loop,
            part,
            target=target,
            layer_kinds=kinds,
            all_scored=self.scores_all,
            window=window,
            chunk=self.chunk,
        )


def _is_one_shape(part: Any) -> bool:
    from autosft.profiles.memory.trace.tracing import AtShape

    return isinstance(part, AtShape) or (isinstance(part, Answers) and part.num_tokens is not None)


def _ends_without_adding(program: Program) -> bool:
    """Return whether the update frees nothing that only the passes that add to gradients allocate."""
    survivors = {
        name
        for title, segment in program.segments.items()
        if title != "micro next"
        for _, name in segment.survivors
    }
    return all(
        name in survivors
        for title in ("update first", "update")
        if title in program.segments
        for name in program.segments[title].ends
    )


#: Tracing patches torch for its duration: one thread at a time.
_TRACING = threading.Lock()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence warnings of libraries about a model that only exists to be traced."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


__all__ = ["StepPrograms", "Untraceable", "step_programs", "versions"]
