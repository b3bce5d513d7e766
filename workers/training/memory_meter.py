"""The peak memory of this process, measured where the device says it."""

from __future__ import annotations

from pathlib import Path

import psutil


class MemoryMeter:
    """Measures peak memory from its creation on, and enforces the cap where torch can.

    CUDA: torch's allocator, capped with `set_per_process_memory_fraction`.  CPU: resident memory above
    what this process had inherited from its server (forked processes count shared pages); the cap is the
    parent's business (see `workers.process`).
    """

    def __init__(self, *, on_cpu: bool, cap_bytes: int, baseline_bytes: int | None = None) -> None:
        """Count from `baseline_bytes` on, where this process has loaded what counts before."""
        self.on_cpu = on_cpu
        if on_cpu:
            reset_peak_resident()
            self.baseline_bytes = resident_bytes("VmRSS") if baseline_bytes is None else baseline_bytes
        else:
            import torch

            device = torch.cuda.current_device()
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes))
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> tuple[int | None, int | None]:
        """Return (peak allocated, peak reserved) in bytes; on the CPU the resident peak and None."""
        if self.on_cpu:
            return max(0, resident_bytes("VmHWM") - self.baseline_bytes), None
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes; outside Linux resident memory now, for either."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    line = next(one for one in status.splitlines() if one.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak_resident() -> None:
    """Set VmHWM back to VmRSS (Linux; elsewhere the peak includes what was before)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
