"""Store traced programs on disk: one .npz per program, with names as JSON text inside; no pickles.

A file's name is a hash of everything that determines the program: configuration, recipe, kind of device,
regime, package versions and this format.  Files are written atomically; an unreadable one is traced again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.memory.program.blocks import Birth, Owner, Phase, unique_rows
from autosft.profiles.memory.program.program import MONOMIALS, CarryName, CompiledSegment, Program

#: Increase it with every change of what a program contains or of how a step is traced.
FORMAT = 4


def program_path(folder: Path, *decisive: object) -> Path:
    """Return the file of the program that the `decisive` values (their reprs) determine."""
    text = repr((FORMAT, MONOMIALS, *decisive))
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def load_program(path: Path) -> Program | None:
    """Return the program in a file, None where the file is missing or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = json.loads(str(stored["names"]))
            segments = {
                one["name"]: _segment(one, {key: stored[f"{i}.{key}"] for key in _ARRAYS})
                for i, one in enumerate(names["segments"])
            }
            return Program(segments, tuple(names["untraced"]))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def save_program(path: Path, program: Program) -> None:
    """Write a program; ignores folders that cannot be written to."""
    arrays: dict[str, Any] = {}
    described = []
    for i, segment in enumerate(program.segments.values()):
        births, birth_of = _unique(segment.births)
        rows, row_of = unique_rows(segment.coefficients)
        carried, carried_of = _unique([name for _, name in segment.survivors] + list(segment.ends))
        described.append(
            {
                "name": segment.name,
                "births": [[b.size, b.operator, b.phase.value, b.layer, b.owner.value] for b in births],
                "carried": [[c.segment, c.operator, c.layer, c.occurrence] for c in carried],
            }
        )
        values = {
            "events": segment.events,
            "phases": [_PHASES.index(phase) for phase in segment.phases],
            "rows": rows,
            "row_of": row_of,
            "birth_of": birth_of,
            "survivors": [local for local, _ in segment.survivors],
            "carried_of": carried_of,
        }
        arrays |= {f"{i}.{key}": _array(key, value) for key, value in values.items()}
    arrays["names"] = np.array(json.dumps({"segments": described, "untraced": program.untraced}))
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(partial, **arrays)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


_ARRAYS = ("events", "phases", "rows", "row_of", "birth_of", "survivors", "carried_of")
_PHASES = list(Phase)


def _array(key: str, value: Any) -> NDArray[Any]:
    return np.asarray(value, dtype=np.float64 if key == "rows" else np.int32)


def _segment(names: Any, arrays: dict[str, NDArray[Any]]) -> CompiledSegment:
    births = [
        Birth(size, op, Phase(phase), layer, Owner(owner))
        for size, op, phase, layer, owner in names["births"]
    ]
    carried = [CarryName(*fields) for fields in names["carried"]]
    carried_of = [carried[i] for i in arrays["carried_of"].tolist()]
    survivors = arrays["survivors"].tolist()
    return CompiledSegment(
        name=names["name"],
        events=tuple(arrays["events"].tolist()),
        phases=tuple(_PHASES[i] for i in arrays["phases"].tolist()),
        coefficients=arrays["rows"][arrays["row_of"]],
        births=tuple(births[i] for i in arrays["birth_of"].tolist()),
        survivors=tuple(zip(survivors, carried_of[: len(survivors)], strict=True)),
        ends=tuple(carried_of[len(survivors) :]),
    )


def _unique(values: Iterable[Hashable]) -> tuple[list[Any], list[int]]:
    """Return the distinct values in order of appearance, and the index of each value among them."""
    position: dict[Any, int] = {}
    found = [position.setdefault(value, len(position)) for value in values]
    return list(position), found
