"""Predict the peaks of single kernels that Liger-Kernel has published: losses and feed-forward layers.

    python benchmarks/kernel_peaks.py --rows kernel_peaks.jsonl [--json out.json]

Rows are those of Liger's benchmark/data/all_benchmark_data.csv whose metric is memory (kernel_name,
kernel_provider, kernel_operation_mode, x_name, x_value, y_value_50 in MiB, extra_benchmark_config_str,
liger_version).  The scripts are reproduced in `harnesses.liger_kernels`, tracing is the product's; nothing
is calibrated.  `--json` writes a list with kernel, provider, mode, x, predicted_bytes, measured_bytes and
relative_error; rows that are not reproduced have null there, and a reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harnesses.liger_kernels import peak_bytes
from harnesses.prediction import NotPredictable, Row

Group = tuple[str, str, str]


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="measurements, one JSON object a line")
    parser.add_argument("--json", type=Path, help="write the answers as a JSON list")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = arguments.rows.read_text("utf-8").splitlines()
    answers = [answer(json.loads(line)) for line in lines if line.strip()]
    show(answers)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    return 0


def answer(row: Row) -> dict[str, Any]:
    measured = round(float(row["y_value_50"]) * (1 << 20))
    found = {
        "kernel": row["kernel_name"],
        "provider": row["kernel_provider"],
        "mode": row["kernel_operation_mode"],
        "x": f"{row['x_name']}={row['x_value']}",
        "predicted_bytes": None,
        "measured_bytes": measured,
        "relative_error": None,
    }
    try:
        predicted = peak_bytes(row)
    except NotPredictable as error:
        return {**found, "reason": str(error)}
    return {**found, "predicted_bytes": predicted, "relative_error": predicted / measured - 1}


def show(answers: Sequence[dict[str, Any]]) -> None:
    """Print the errors by kernel, provider and mode."""
    groups: dict[Group, list[dict[str, Any]]] = {}
    for item in answers:
        groups.setdefault((item["kernel"], item["provider"], item["mode"]), []).append(item)
    print(f"{'kernel':28} {'provider':16} {'mode':9} rows   median    worst")
    for (kernel, provider, mode), group in groups.items():
        errors = [item["relative_error"] for item in group if item["relative_error"] is not None]
        said = f"{statistics.median(map(abs, errors)):7.3%}  {max(errors, key=abs):+8.3%}" if errors else ""
        print(f"{kernel:28} {provider:16} {mode:9} {len(group):4}  {said or group[0]['reason']}")
    errors = [abs(item["relative_error"]) for item in answers if item["relative_error"] is not None]
    if errors:
        median = statistics.median(errors)
        print(f"{len(errors)} of {len(answers)} rows: median {median:.3%}, worst {max(errors):.3%}")


if __name__ == "__main__":
    sys.exit(main())
