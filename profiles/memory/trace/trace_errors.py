"""Explain to users which part of a step could not be traced, and how to make it traceable."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from autosft.profiles.memory.program.program import NotPolynomial
from autosft.profiles.recipe import StepRecipe
from autosft.profiles.user_code import UserCode

#: The default remedy; such a run measures its memory itself (`scheduler.decide.self_measuring`).
OTHERWISE = "Choose a model, a method or an adapter whose step does not depend on values, or report this one."

#: The remedy where a padding-free row may be the reason.
WITH_PADDING = "Leave --padding-free out, where padded batches can be followed."

_OPERATOR = re.compile(r"\baten::[\w.]+|(?<=function for )torch\.[\w.]+")
#: The tracer itself: `profiles/memory` and what is below it.
_OWN_FOLDER = Path(__file__).resolve().parents[1]
_LIBRARIES = ("/torch/", "/unittest/")


class Untraceable(Exception):  # noqa: N818 - names what could not be traced
    """The step does not run on the meta device; `what` is a noun phrase, `remedy` a sentence."""

    def __init__(self, what: str, remedy: str = OTHERWISE) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def untraceable(error: Exception, recipe: StepRecipe) -> Untraceable:
    """Return the error for the operator or user code that raised `error` while a step was traced."""
    if isinstance(error, Untraceable):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    said = _first_line(error)
    if isinstance(error, NotPolynomial):
        return Untraceable(f"how the step's memory grows with batch and length ({said})")
    for code, flag in ((recipe.loss, "--loss"), (recipe.trainer, "--trainer")):
        where = None if code is None else _last_in_module(frames, code)
        if code is not None and where is not None and isinstance(error, MemoryError):
            return Untraceable(
                f"{flag} {code.name} ({where}: {said}), which takes more RAM than this process may",
                "Write it with torch's operators: the arrays of other libraries are allocated while it is "
                "traced, and their memory is not predicted.",
            )
        if code is not None and where is not None:
            return Untraceable(
                f"{flag} {code.name} ({where}: {type(error).__name__}: {said})",
                "Its shapes may not depend on the values of tensors: write it with torch's operators, not "
                "with .item(), .nonzero() or an index made from what the labels are.",
            )
    remedy = WITH_PADDING if recipe.padding_free else OTHERWISE
    where = place(frames)
    operator = _OPERATOR.search(str(error))
    if operator is not None:
        return Untraceable(f"the operator {operator[0]}{where and f', called in {where},'}", remedy)
    return Untraceable(f"the step{where and f' in {where}'} ({type(error).__name__}: {said})", remedy)


def where_called() -> str:
    """Return file and line of the innermost frame on the stack that is neither torch's nor autosft's."""
    return place(traceback.extract_stack())


def place(frames: Iterable[traceback.FrameSummary]) -> str:
    """Return "file.py line 12" of the innermost frame that is neither torch's nor autosft's; else ""."""
    found = ""
    for frame in frames:
        is_ours = _OWN_FOLDER in Path(frame.filename).parents
        if not is_ours and not any(name in frame.filename for name in _LIBRARIES):
            found = f"{Path(frame.filename).name} line {frame.lineno}"
    return found


def _last_in_module(frames: Iterable[traceback.FrameSummary], code: UserCode) -> str | None:
    source = getattr(sys.modules.get(code.name.partition(":")[0]), "__file__", None)
    lines = [frame.lineno for frame in frames if frame.filename == source]
    return f"line {lines[-1]}" if lines else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
