"""Programs of our trainer's step, made on demand and kept: in this process, and on disk between them."""

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
from autosft.profiles.hardware import DeviceKind
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.cache import load_program, program_path, save_program
from autosft.profiles.memory.program import NotPolynomial, Program
from autosft.profiles.memory.untraced import Untraceable, untraceable
from autosft.profiles.recipe import Method, Sharding, StepRecipe

#: Compute capability from which on flash attention is taken (see `emulation`).
FLASH_CAPABILITY = (8, 0)
TRACED_PACKAGES = ("torch", "transformers", "trl", "peft")


@functools.cache
def versions() -> str:
    """Return the versions of the packages that decide what a step does."""
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
    trusted: bool,
    cache_dir: Path | None,
) -> StepPrograms:
    """Return the programs of a recipe; what sharding and accumulation add is not part of them.

    Of the compute capability only what decides the step's kernels counts: one trace serves all newer GPUs.
    """
    traced = dataclasses.replace(
        recipe,
        method=Method.FULL if recipe.method is Method.SPARSE else recipe.method,
        sharding=Sharding.NONE,
        data_parallel=1,
        gradient_accumulation=min(recipe.gradient_accumulation, 2),
        sorts_steps=False,
        max_rounds=None,
    )
    if kind is DeviceKind.CUDA:
        capability = FLASH_CAPABILITY if (capability or FLASH_CAPABILITY) >= FLASH_CAPABILITY else (7, 0)
    return _step_programs(config_json, traced, kind, capability, trusted, cache_dir)


@functools.lru_cache(maxsize=64)
def _step_programs(
    config_json: str,
    recipe: StepRecipe,
    kind: DeviceKind,
    capability: tuple[int, int] | None,
    trusted: bool,
    cache_dir: Path | None,
) -> StepPrograms:
    return StepPrograms(config_json, recipe, kind, capability, trusted, cache_dir)


@dataclass(slots=True)
class StepPrograms:
    """The programs of one recipe, by regime."""

    config_json: str
    recipe: StepRecipe
    kind: DeviceKind
    capability: tuple[int, int] | None
    trusted: bool
    cache_dir: Path | None
    _made: dict[Any, Program] = field(default_factory=dict)
    _shallow: Any = None
    _loop: Any = None

    def for_batch(self, batch: Batch) -> Program:
        """Return the program that covers a batch; raises Untraceable where there is none."""
        from autosft.profiles.memory.tracing import Regime

        regime = Regime.of(batch.shape, padded=batch.padded, window=self._window())
        if regime not in self._made:
            with _TRACING, _quietly():
                if regime not in self._made:
                    self._made[regime] = self._stored(regime) or self._make(regime)
        return self._made[regime]

    def _path(self, regime: Any) -> Path | None:
        # Code of the model's repository is not part of the key, so its programs are not kept.
        if self.cache_dir is None or self.trusted:
            return None
        return program_path(
            self.cache_dir, self.config_json, self.recipe, self.kind, self.capability, regime, versions()
        )

    def _stored(self, regime: Any) -> Program | None:
        path = self._path(regime)
        return None if path is None else load_program(path)

    def as_scored(self, batch: Batch) -> Batch:
        """Return a batch with the positions that trl's head scores: on the CPU all of them."""
        if self.kind is DeviceKind.CUDA and not self.recipe.has_full_logits:
            return batch
        shape = batch.shape
        return dataclasses.replace(
            batch, shape=dataclasses.replace(shape, scored=shape.batch * (shape.seq - 1))
        )

    def _window(self) -> int | None:
        self._load()
        window: int | None = self._shallow.window
        return window

    def _load(self) -> None:
        if self._shallow is not None:
            return
        from autosft.profiles.memory.trainer_step import shallow_model

        try:
            self._shallow = shallow_model(self.config_json)
        except Exception as error:
            raise untraceable(error, self.recipe) from error

    def _make(self, regime: Any) -> Program:
        program = self._trace(regime)
        if self.kind is DeviceKind.CUDA and self.capability == (7, 0) and _uses(program, "_grouped_mm"):
            # transformers then runs the experts one by one, on as many tokens as are routed to each
            what = "the experts' products, which this GPU (older than compute capability 8.0) runs one by one"
            program = dataclasses.replace(program, untraced=(*program.untraced, what))
        path = self._path(regime)
        if path is not None:
            save_program(path, program)
        return program

    def _trace(self, regime: Any) -> Program:
        from autosft.profiles.memory import trainer_step
        from autosft.profiles.memory.tracing import program_of

        all_scored = self.kind is DeviceKind.CPU or self.recipe.has_full_logits
        target = trainer_step.target_of(self.recipe, self.kind, self.capability)
        try:
            if self._loop is None:
                self._loop = trainer_step.trainer_loop(
                    self._shallow.config, self.recipe, self.kind, trust_remote_code=self.trusted
                )
            kinds = self._shallow.layer_kinds
            try:
                return program_of(
                    self._loop, regime, target=target, layer_kinds=kinds, all_scored=all_scored,
                    window=self._shallow.window,
                )  # fmt: skip
            except NotPolynomial:
                # Layers that keep something across one another: traced at full depth, more slowly.
                config = trainer_step.load_config(self.config_json)
                self._loop = trainer_step.trainer_loop(
                    config, self.recipe, self.kind, trust_remote_code=self.trusted
                )
                kinds = tuple(range(len(self._loop.layers)))
                self._shallow = dataclasses.replace(self._shallow, config=config, layer_kinds=kinds)
                return program_of(
                    self._loop, regime, target=target, layer_kinds=kinds, all_scored=all_scored,
                    window=self._shallow.window,
                )  # fmt: skip
        except UserError:
            raise
        except Exception as error:
            raise untraceable(error, self.recipe) from error


def _uses(program: Program, operator: str) -> bool:
    return any(operator in one.operator for segment in program.segments.values() for one in segment.births)


#: Tracing patches torch for its duration: one thread at a time.
_TRACING = threading.Lock()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what libraries say about a model that only exists to be traced off the user's terminal."""
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
