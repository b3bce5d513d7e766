"""Predict published measurements of fine-tuning memory, beside what other estimators say.

    python benchmarks/memory_accuracy.py --rows rows.jsonl [--json out.json]
    python benchmarks/memory_accuracy.py --boundaries boundaries.jsonl [--json out.json]

`--rows`: one measurement a line (source, model_id, method, per_device_batch, seq_len, peak_gb, unit,
peak_kind, ...).  Each source's own training loop is reproduced in `harnesses`; tracing, replay and bounds are
the functions that `autosft plan` calls.  Rows that cannot be predicted are listed with the reason.

`--boundaries`: settings that did or did not fit on a card (config, gpu_capacity, fits).

`--json` writes a list with the keys source, model_id, predicted_bytes, upper_bytes, measured_bytes,
relative_error ((predicted - measured) / measured), covered (measured <= upper), and for every peer both
`peers[NAME]["relative_error"]` and `NAME_relative_error`.  Rows that could not be predicted have `null` for
the prediction and a `reason`.

The bound is the product's conformal one over benchmarks/data/published_calibration.jsonl, the predictions of
rows known during development; a row is never calibrated by itself, nor by repetitions of its own run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harnesses import NotPredictable, Prediction, Row, meta_model, predict
from peers import PEERS, size_of

from autosft.profiles.memory.calibration import Calibration, CalibrationRow, bound_for, fingerprint

CALIBRATION = Path(__file__).resolve().parent / "data" / "published_calibration.jsonl"
#: Whoever published a row ran it on a machine that has never been calibrated: its bound borrows from all
#: development rows and is wider for it, although the rows of its source may be many.
NOT_OUR_STACK = "a published machine"
#: Keys of an answer that are for the table and the calibration only.
INTERNAL = ("what", "stack", "run", "known_stack", "bound_level", "bound_rows", "duration_s", "note")
#: The bound of sharded runs is no narrower: of six development rows one is 4.7 % above its prediction.
SHARDED_UPPER_RATIO = 1.05
UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    arguments = _arguments(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = read_rows(arguments.rows_or_boundaries)
    if arguments.boundaries is not None:
        from boundaries import judge_boundaries

        answers = judge_boundaries(rows)
    else:
        answers = judge_rows(rows, complete_only=not arguments.all)
        if arguments.write_calibration:
            _write_calibration(answers)
    if arguments.json is not None:
        public = [{key: value for key, value in answer.items() if key not in INTERNAL} for answer in answers]
        arguments.json.write_text(json.dumps(public, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", type=Path, help="measurements, one JSON object a line")
    what.add_argument("--boundaries", type=Path, help="what did and did not fit, one JSON object a line")
    parser.add_argument("--json", type=Path, help="write the answers as a JSON list")
    parser.add_argument("--all", action="store_true", help="rows graded B and C too, not only A and A-")
    parser.add_argument(
        "--write-calibration", action="store_true", help=f"keep the predictions in {CALIBRATION.name}"
    )
    arguments = parser.parse_args(argv)
    arguments.rows_or_boundaries = arguments.rows or arguments.boundaries
    return arguments


# Rows


def judge_rows(rows: Sequence[Row], *, complete_only: bool = False) -> list[dict[str, Any]]:
    """Predict every row, print a table, and return one answer a row, in order."""
    answers = []
    for row in rows:
        if "broken" in row or not row.get("source") or not row.get("model_id"):
            answers.append(_unpredicted(row, row.get("broken", "source or model_id is missing")))
            continue
        if complete_only and row.get("completeness") not in (None, "A", "A-"):
            answers.append(_unpredicted(row, f"graded {row['completeness']}: incomplete (see --all)"))
            continue
        started = time.monotonic()
        try:
            measured_bytes(row)
            prediction = predict(row)
            answers.append(_answer(row, prediction, time.monotonic() - started))
        except NotPredictable as error:
            answers.append(_unpredicted(row, str(error)))
            continue
        except Exception as error:  # one bad row must not hide the others; it is listed below
            answers.append(_unpredicted(row, f"failed: {type(error).__name__}: {error}"))
            continue
        print(_line(answers[-1]), flush=True)
    _summary(answers)
    return answers


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; a line that is no JSON object becomes a row that says so."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = error.msg
        rows.append(row if isinstance(row, dict) else {"broken": f"line {number} is no JSON object: {row}"})
    return rows


def measured_bytes(row: Row) -> int:
    """Return a row's peak in bytes; raises NotPredictable where it does not say it in a known unit."""
    try:
        return round(float(row["peak_gb"]) * UNITS[row.get("unit") or "GiB"])
    except (KeyError, TypeError, ValueError):
        stated = f"{row.get('peak_gb')!r} {row.get('unit')!r}"
        raise NotPredictable(f"the measured peak cannot be read: {stated}") from None


def _unpredicted(row: Row, reason: str) -> dict[str, Any]:
    measured = None
    with contextlib.suppress(NotPredictable):
        measured = measured_bytes(row)
    return {
        "source": row.get("source"),
        "model_id": row.get("model_id"),
        "predicted_bytes": None,
        "upper_bytes": None,
        "measured_bytes": measured,
        "relative_error": None,
        "covered": None,
        "peers": {},
        **{f"{name}_relative_error": None for name in PEERS},
        "reason": reason,
    }


def _answer(row: Row, prediction: Prediction, duration_s: float) -> dict[str, Any]:
    measured = measured_bytes(row)
    predicted = prediction.allocated_bytes
    if row.get("peak_kind") == "reserved":
        if prediction.reserved_bytes is None:
            raise NotPredictable("reserved memory is not replayed for this source, only allocated")
        predicted = prediction.reserved_bytes
    bound = bound_for(calibration_without(row), NOT_OUR_STACK)
    least_ratio = SHARDED_UPPER_RATIO if stack_of(row).endswith("|sharded") else 1.0
    upper = int(predicted * max(bound.upper_ratio, least_ratio))
    answer: dict[str, Any] = {
        "source": row["source"],
        "model_id": row["model_id"],
        "predicted_bytes": predicted,
        "upper_bytes": upper,
        "measured_bytes": measured,
        "relative_error": predicted / measured - 1,
        "covered": measured <= upper,
        "peers": {},
        "what": _what(row),
        "stack": stack_of(row),
        "run": run_of(row),
        "known_stack": prediction.known_stack,
        "bound_level": bound.level,
        "bound_rows": bound.num_rows,
        "duration_s": round(duration_s, 1),
        "note": prediction.note,
    }
    size = size_of(meta_model(row))  # type: ignore[arg-type]
    for name, estimate in PEERS.items():
        said = estimate(row, size)
        answer["peers"][name] = {"predicted_bytes": int(said), "relative_error": said / measured - 1}
        answer[f"{name}_relative_error"] = said / measured - 1
    return answer


def _what(row: Row) -> str:
    parts = [str(row["method"])]
    if row.get("lora_r"):
        parts.append(f"r{row['lora_r']}")
    if row.get("quantization"):
        parts.append(str(row["quantization"]))
    parts.append(f"b{row.get('per_device_batch')}")
    if (row.get("n_gpus") or 1) > 1:
        parts.append(f"{row['n_gpus']} GPUs")
    return " ".join(parts)


# The bound


def stack_of(row: Row) -> str:
    """Name the stack of a row, as the product names that of a trial."""
    sharding = "none" if (row.get("n_gpus") or 1) == 1 else "sharded"
    return fingerprint(
        str(row.get("gpu")),
        f"{row['source']} {row.get('versions') or 'versions not stated'}",
        str(row["method"]),
        f"{row.get('weights_dtype')} {row.get('mixed_precision')}",
        sharding,
    )


def run_of(row: Row) -> str:
    """Name the run of a row: repetitions of it with other versions are no independent evidence."""
    return "|".join(
        str(row.get(key))
        for key in ("source", "model_id", "method", "lora_r", "quantization", "per_device_batch", "seq_len",
                    "n_gpus", "mixed_precision")
    )  # fmt: skip


def calibration_without(row: Row) -> Calibration:
    """Return what the development rows teach, without the row's own run.

    Sharded runs are too few to bound each other: they borrow from those on one device, which are traced and
    replayed in the same way; not the other way round.
    """
    sharded = stack_of(row).endswith("|sharded")
    kept = [
        CalibrationRow(
            fingerprint=known["stack"],
            predicted_bytes=known["predicted_bytes"],
            measured_bytes=known["measured_bytes"],
        )
        for known in _known_rows()
        if known["run"] != run_of(row) and (sharded or not known["stack"].endswith("|sharded"))
    ]
    return Calibration(rows=tuple(kept))


def _known_rows() -> list[dict[str, Any]]:
    if not CALIBRATION.exists():
        return []
    return [json.loads(line) for line in CALIBRATION.read_text("utf-8").splitlines()]


def _write_calibration(answers: Sequence[dict[str, Any]]) -> None:
    keys = ("run", "stack", "predicted_bytes", "measured_bytes")
    lines = [
        json.dumps({key: answer[key] for key in keys}) for answer in answers if answer["predicted_bytes"]
    ]
    CALIBRATION.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")


# The report


def _line(answer: dict[str, Any]) -> str:
    gib = 1 << 30
    remarks = "" if answer["covered"] else "  NOT COVERED"
    remarks += "" if answer["known_stack"] else "  (other versions)"
    return (
        f"{answer['source'][:26]:26} {answer['model_id'].split('/')[-1][:24]:24} {answer['what'][:26]:26} "
        f"predicted {answer['predicted_bytes'] / gib:7.2f}  upper {answer['upper_bytes'] / gib:7.2f}  "
        f"measured {answer['measured_bytes'] / gib:7.2f} GiB  {answer['relative_error']:+7.2%}{remarks}"
    )


def _summary(answers: Sequence[dict[str, Any]]) -> None:
    predicted = [answer for answer in answers if answer["predicted_bytes"] is not None]
    left = [answer for answer in answers if answer["predicted_bytes"] is None]
    if left:
        reasons: dict[tuple[str, str], int] = {}
        for answer in left:
            key = (answer["source"], answer["reason"])
            reasons[key] = reasons.get(key, 0) + 1
        print(f"\nnot predicted ({len(left)}):")
        for (source, reason), count in reasons.items():
            print(f"  {count:4} {source}: {reason}")
    if not predicted:
        return
    groups: dict[str, list[dict[str, Any]]] = {"all": predicted}
    for answer in predicted:
        sharded = answer["stack"].endswith("|sharded")
        versions = "" if answer["known_stack"] else ", other versions of torch"
        groups.setdefault(answer["source"] + (", sharded" if sharded else "") + versions, []).append(answer)
    print(f"\n{'':50} rows  median  95th p.   worst  under  covered  width")
    for name, group in groups.items():
        errors = [answer["relative_error"] for answer in group]
        covered = sum(answer["covered"] for answer in group)
        width = statistics.median(a["upper_bytes"] / a["predicted_bytes"] - 1 for a in group)
        print(f"{name[:50]:50} {_statistics(errors)} {covered:4}/{len(group):<3} {width:6.1%}")
    for name in PEERS:
        print(f"{name:50} {_statistics([a['peers'][name]['relative_error'] for a in predicted])}")
    level, count = predicted[0]["bound_level"], predicted[0]["bound_rows"]
    print(f"bound: conformal over {count} development rows, stated level {level:.1%} (first row's)")


def _statistics(errors: Sequence[float]) -> str:
    """Return count, median, 95th percentile and maximum of the absolute errors, and the share under 0."""
    sizes = sorted(abs(error) for error in errors)
    p95 = sizes[min(len(sizes) - 1, -(-len(sizes) * 95 // 100) - 1)]
    under = sum(error < 0 for error in errors) / len(errors)
    return f"{len(errors):4}  {statistics.median(sizes):6.2%}  {p95:7.2%} {sizes[-1]:7.2%}  {under:4.0%}"


if __name__ == "__main__":
    sys.exit(main())
