"""Exports of a study: `best.yaml`, and the same configuration in the formats of other tools."""

from __future__ import annotations

from autosft.studies.export.config import (
    DataSource,
    Expected,
    ExportedConfig,
    ModelSource,
    PromptSource,
    as_yaml,
    exported,
    read_config,
    write_config,
)

__all__ = [
    "DataSource",
    "Expected",
    "ExportedConfig",
    "ModelSource",
    "PromptSource",
    "as_yaml",
    "exported",
    "read_config",
    "write_config",
]
