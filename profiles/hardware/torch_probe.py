"""Report torch's build and allocator (`python -m autosft.profiles.hardware.torch_probe` prints a TorchBuild).

The settings are read back from the allocator, after an allocation: a setting in the environment may be
misspelled, unknown to this version, or not supported by the system.
"""

from __future__ import annotations

import json
from typing import Any


def probe() -> dict[str, Any]:
    """Return the fields of a `machine.TorchBuild`."""
    import torch

    told: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "sees_cuda": False,
        "error": "",
    }
    if torch.version.cuda is None:
        return told
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        told["sees_cuda"] = torch.cuda.device_count() > 0
        if told["sees_cuda"]:
            kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")  # a segment of its own
            segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            told["allocator"] = torch.cuda.get_allocator_backend()
            told["allocator_settings"] = torch._C._accelerator_getAllocatorSettings()
            told["has_expandable_segments"] = any(segment.get("is_expandable", False) for segment in segments)
            del kept
    except (RuntimeError, AssertionError) as error:
        told["error"] = str(error).strip().splitlines()[0]
    return told


if __name__ == "__main__":
    print(json.dumps(probe()))  # noqa: T201
