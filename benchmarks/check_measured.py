"""Compare what measure_memory.py measured with what autosft predicts for the same batches.

    python benchmarks/measure_memory.py --check measured.jsonl [--caps-out caps.jsonl]

The very batches of each run are predicted, in their order, by the product's trace and replay; steps of a
plain loop (no trl) are counted and left out.  `--caps-out` writes the trials that are still to be run, with
`measure_memory.py --out measured.jsonl --caps caps.jsonl`: every setting once at its upper bound, where it
must run, and once at 90 % of its predicted need, where it must fail.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured_step import SHAPES, TINY_SHAPES

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.hardware.device_kinds import CPU_CONSTANT_BYTES, CUBLAS_BYTES, CUBLAS_HOPPER_BYTES
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.calibration import bound_for
from autosft.profiles.memory.program.blocks import Owner
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.program.run import Beside, Run
from autosft.profiles.memory.program_cache import StepPrograms, step_programs
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision, StepRecipe

PRECISIONS = {"bf16": Precision.BF16, "bf16-autocast": Precision.BF16_AUTOCAST}
TOLERANCE = 1 / 128
SHARE_THAT_MUST_FAIL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the product says of a measured setting, in bytes."""

    allocated: int
    need: int
    reserved: int


def check(path: Path, caps_out: Path | None = None) -> int:
    """Print the comparison; return 0 where every goal that could be judged was reached, else 1."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    [machine] = [row for row in rows if row["kind"] == "machine"]
    measured = [row for row in rows if row["kind"] != "machine" and row.get("fits") is not None]
    failed = [row for row in rows if row["kind"] != "machine" and row.get("fits") is None]
    known: dict[str, Predicted] = {}
    left: dict[str, int] = {}
    for row in measured:
        key = json.dumps(row["setting"])
        if row["setting"]["step"] != "trl":
            left["a plain loop's step"] = left.get("a plain loop's step", 0) + 1
        elif key not in known:
            try:
                known[key] = predict(row["setting"], machine)
            except Exception as error:  # one setting must not hide the others
                reason = f"{type(error).__name__}: {error}"[:100]
                left[reason] = left.get(reason, 0) + 1
    pairs = [(row, known[key]) for row in measured if (key := json.dumps(row["setting"])) in known]
    print(f"{path}: {machine.get('gpu', 'CPU')}, {machine['versions']}")
    print(f"{len(pairs)} rows compared; left out: {left or 'none'}; {len(failed)} failed otherwise\n")
    goals = [*_errors(pairs), *_caps(pairs)]
    for name, said, reached in goals:
        verdict = "" if reached is None else "  reached" if reached else "  MISSED"
        print(f"{name:58} {said}{verdict}")
    if caps_out is not None:
        _write_caps(caps_out, pairs)
    return 0 if all(reached is not False for _, _, reached in goals) else 1


def predict(setting: dict[str, Any], machine: dict[str, Any]) -> Predicted:
    """Predict a setting over the batches that it ran."""
    kind = DeviceKind.CPU if machine["device"] == "cpu" else DeviceKind.CUDA
    capability = tuple(machine["capability"]) if kind is DeviceKind.CUDA else None
    config = json.dumps((SHAPES | TINY_SHAPES)[setting["shape"]])
    programs = step_programs(config, _recipe(setting), kind, capability, trusted=False, cache_dir=None)
    kept: tuple[tuple[Owner, int], ...] = ()
    if capability is not None:
        workspace = CUBLAS_HOPPER_BYTES if capability >= (9, 0) else CUBLAS_BYTES
        kept = ((Owner.WORKSPACE, workspace),) * 2
    run = Run(list(_steps(programs, setting)), Beside(kept=kept))
    allocated = run.allocated_bytes()
    if kind is DeviceKind.CPU:
        resident = allocated + CPU_CONSTANT_BYTES
        return Predicted(allocated=resident, need=resident, reserved=resident)
    need, reserved = run.need_bytes(AllocatorOptions(), tolerance=TOLERANCE)
    return Predicted(allocated=allocated, need=max(need, allocated), reserved=reserved)


def _recipe(setting: dict[str, Any]) -> StepRecipe:
    targets, lora = setting["targets"], None
    if setting["method"] == "lora":
        rank = setting["rank"] or 8
        lora = AdapterSettings(
            rank=rank, alpha=2 * rank, targets=targets if isinstance(targets, str) else tuple(targets)
        )
    return StepRecipe(
        method=Method(setting["method"]),
        adapter=lora,
        precision=PRECISIONS[setting["precision"]],
        optimizer=setting["optimizer"],
        checkpointing=Checkpointing.NON_REENTRANT if setting["checkpointing"] else Checkpointing.OFF,
        attention="sdpa",
        gradient_accumulation=setting["accumulation"],
    )


def _steps(programs: StepPrograms, setting: dict[str, Any]) -> Iterator[tuple[Any, Shape]]:
    batches = [programs.as_scored(_batch(rows, setting["prompt_share"])) for rows in setting["lengths"]]
    yield programs.for_batch(batches[0]).segments["setup"], batches[0].shape
    accumulation = setting["accumulation"]
    for number, batch in enumerate(batches):
        segments = programs.for_batch(batch).segments
        yield segments["micro next" if number % accumulation else "micro"], batch.shape
        if (number + 1) % accumulation == 0:
            yield segments["update first" if number < accumulation else "update"], batch.shape


def _batch(rows: Sequence[int], prompt_share: float) -> Batch:
    seq, padded = max(rows), min(rows) < max(rows)
    if padded and seq % 8 == 0:
        seq += 1  # as autosft.profiles.memory.batches.collate
    scored = sum(min(length - 1, length - int(length * prompt_share)) for length in rows)
    return Batch(shape=Shape(batch=len(rows), seq=seq, scored=max(1, scored)), padded=padded)


Goal = tuple[str, str, bool | None]


def _errors(pairs: Sequence[tuple[dict[str, Any], Predicted]]) -> Iterator[Goal]:
    """Yield the errors of peaks and needs; goals are those of the memory model's issue."""
    peaks = [(row, said) for row, said in pairs if row["kind"] == "peak" and row["fits"]]
    needs = [(row, said) for row, said in pairs if row["kind"] == "need"]
    resident = [(said.allocated, row["peak_resident_bytes"]) for row, said in peaks
                if "peak_resident_bytes" in row]  # fmt: skip
    allocated = [(said.allocated, row["peak_allocated_bytes"]) for row, said in peaks
                 if "peak_allocated_bytes" in row]  # fmt: skip
    reserved = [(said.reserved, row["peak_reserved_bytes"]) for row, said in peaks
                if "peak_reserved_bytes" in row]  # fmt: skip
    yield from _error("allocated (median <= 1 %, 95 % <= 3 %)", allocated, 0.01, 0.03)
    yield from _error("reserved without a cap", reserved, None, None)
    needed = [(said.need, row["need_bytes"]) for row, said in needs]
    yield from _error("need (median <= 1 %, 95 % <= 3 %)", needed, 0.01, 0.03)
    if resident:
        excess = sorted(abs(said - saw) / max(saw, (40 << 20) / 0.05) for said, saw in resident)
        words = f"{len(excess)} runs: {_percent(excess)}"
        yield "resident, of the larger of it and 800 MiB (5 %, 10 %)", words, _within(excess, 0.05, 0.10)


def _error(
    name: str, pairs: Sequence[tuple[int, int]], median: float | None, p95: float | None
) -> Iterator[Goal]:
    if pairs:
        errors = sorted(abs(said / saw - 1) for said, saw in pairs)
        under = sum(said < saw for said, saw in pairs) / len(pairs)
        reached = None if median is None or p95 is None else _within(errors, median, p95)
        yield name, f"{len(pairs)} runs: {_percent(errors)}, {under:.0%} under", reached


def _within(errors: Sequence[float], median: float, p95: float) -> bool:
    return statistics.median(errors) <= median and _p95(errors) <= p95


def _p95(errors: Sequence[float]) -> float:
    return errors[min(len(errors) - 1, -(-len(errors) * 95 // 100) - 1)]


def _percent(errors: Sequence[float]) -> str:
    return f"median {statistics.median(errors):.2%}, 95 % {_p95(errors):.2%}, worst {errors[-1]:.2%}"


def _caps(pairs: Sequence[tuple[dict[str, Any], Predicted]]) -> Iterator[Goal]:
    upper = bound_for(None, "").upper_ratio
    trials = [(row, said) for row, said in pairs if row["kind"] == "trial"]
    if trials:
        claimed = [row for row, said in trials if said.need * upper <= row["cap_bytes"]]
        false_fits = sum(not row["fits"] for row in claimed)
        refused = sum(bool(row["fits"]) for row, said in trials if said.need * upper > row["cap_bytes"])
        words = f"{len(trials)} trials, {len(claimed)} claimed: {false_fits} did not, {refused} refused did"
        yield "fits / does not fit (no false fit)", words, false_fits == 0
    at_bound = [row for row, _ in pairs if row["kind"] == "cap" and row["label"] == "bound"]
    if at_bound:
        died = sum(not row["fits"] for row in at_bound)
        yield "under a cap equal to the bound (none dies)", f"{died} of {len(at_bound)} died", died == 0
    short = [row for row, _ in pairs if row["kind"] == "cap" and row["label"] == "90 %"]
    if short:
        died = sum(not row["fits"] for row in short)
        reached = died >= SHARE_THAT_MUST_FAIL * len(short)
        yield "under 90 % of the predicted need (90 % die)", f"{died} of {len(short)} died", reached


def _write_caps(out: Path, pairs: Sequence[tuple[dict[str, Any], Predicted]]) -> None:
    upper = bound_for(None, "").upper_ratio
    lines = []
    for row, said in pairs:
        if row["kind"] == "peak" and row["fits"]:
            for label, cap in (("bound", int(said.need * upper)), ("90 %", int(said.need * 0.9))):
                lines.append(json.dumps({"setting": row["setting"], "cap_bytes": cap, "label": label}))
    out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"\n{out}: {len(lines)} trials; run them with measure_memory.py --caps, then --check again")
