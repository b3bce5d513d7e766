"""Read the settings of PyTorch's allocator from the environment, and simulate it with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.memory.allocator.caching_allocator import CachingAllocator

#: The variables that torch reads its allocator's settings from, the newer first (c10/core/AllocatorConfig.h).
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
#: Settings that are not simulated, with their neutral values.
_NOT_SIMULATED = {
    "backend": "native",
    "garbage_collection_threshold": "0",
    "roundup_power2_divisions": "",
    "per_process_memory_fraction": "1.0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorOptions:
    """The settings of PYTORCH_CUDA_ALLOC_CONF that are simulated."""

    max_split_size_bytes: int | None = None
    expandable_segments: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> AllocatorOptions:
        """Read the settings of a process with this environment.

        Raises UserError for settings that affect memory but are not simulated.
        """
        name = next((variable for variable in ALLOCATOR_VARIABLES if environment.get(variable)), None)
        values: dict[str, str] = {}
        for part in environment[name].split(",") if name else ():
            key, _, value = part.strip().partition(":")
            values[key.strip()] = value.strip()
        for key, harmless in _NOT_SIMULATED.items():
            if values.get(key, harmless).lower() != harmless:
                raise UserError(
                    f"{name} sets {key}:{values[key]}, whose memory cannot be predicted.",
                    remedy="Leave it out; max_split_size_mb and expandable_segments are predicted.",
                )
        split = values.get("max_split_size_mb")
        if split is not None and not split.isdigit():
            raise UserError(f"{name}: max_split_size_mb:{split} is not a number of MiB above 20.")
        return cls(
            max_split_size_bytes=None if split is None else int(split) << 20,
            expandable_segments=values.get("expandable_segments", "false").lower() == "true",
        )

    def allocator(self, cap_bytes: int | None = None, *, cap_grows: bool = False) -> CachingAllocator:
        """Return an allocator with these settings."""
        return CachingAllocator(
            cap_bytes=cap_bytes,
            cap_grows=cap_grows,
            max_split_size_bytes=self.max_split_size_bytes,
            expandable_segments=self.expandable_segments,
        )
