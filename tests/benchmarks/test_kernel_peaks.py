"""Peaks of single kernels that Liger-Kernel has published (benchmark/data/all_benchmark_data.csv)."""

from __future__ import annotations

import json
from typing import Any

import kernel_peaks
import pytest

A100 = "NVIDIA A100-SXM4-80GB"
HEAD = {"H": 4096, "V": 128256, "mode": "forward", "dtype": "torch.bfloat16"}
TILED = {
    "bsz": 2, "hidden_size": 2048, "intermediate_size": 4096, "hidden_act": "silu",
    "activation_type": "swiglu", "num_shards": 4, "dtype": "torch.bfloat16",
}  # fmt: skip
#: kernel, provider, mode, version, x, its value, the other sizes, the published median in MiB
ROWS: list[tuple[str, str, str, str, str, int, dict[str, Any], float]] = [
    ("cross_entropy", "liger", "full", "0.2.1", "V", 4096, {"B": 8, "T": 2048}, 256.32861328125),
    ("cross_entropy", "huggingface", "full", "0.2.1", "V", 4096, {"B": 8, "T": 2048}, 1280.13),
    ("fused_linear_cross_entropy", "liger", "full", "0.4.2", "BT", 4096, HEAD, 4245.55),
    ("fused_linear_cross_entropy", "huggingface", "full", "0.4.2", "BT", 4096, HEAD, 6092.28),
    ("tiled_swiglu", "liger_tiled", "full", "0.6.3", "T", 1024, TILED, 186.25),
    ("tiled_swiglu", "deepspeed_tiled", "forward", "0.6.3", "T", 1024, TILED, 90.25),
]


def row(kernel: str, provider: str, mode: str, version: str, x: str, value: int, config: Any) -> Any:
    return {
        "kernel_name": kernel,
        "kernel_provider": provider,
        "kernel_operation_mode": mode,
        "x_name": x,
        "x_value": str(value),
        "extra_benchmark_config_str": json.dumps(config),
        "gpu_name": A100,
        "liger_version": version,
    }


@pytest.mark.parametrize("given", ROWS, ids=lambda given: "-".join(given[:3]))
def test_a_kernels_peak_is_what_was_published(given: Any) -> None:
    *what, measured_mib = given
    answer = kernel_peaks.answer(row(*what) | {"y_value_50": str(measured_mib)})
    assert answer["relative_error"] == pytest.approx(0, abs=0.001)


def test_what_is_not_reproduced_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = kernel_peaks.answer(
        row("rope", "liger", "full", "0.2.1", "T", 1024, {}) | {"y_value_50": "49.1"}
    )
    assert left_out["predicted_bytes"] is None
    kernel_peaks.show([left_out])
    assert "rotation" in capsys.readouterr().out
