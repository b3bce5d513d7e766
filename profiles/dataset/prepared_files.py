"""Convert tokenized examples to Arrow and write the folder of prepared data."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autosft.profiles.dataset.prepared import IGNORED, MANIFEST, PreparedData, manifest_of
from autosft.profiles.dataset.tokens import Tokenized
from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_EXAMPLES = 1000
_COLUMNS = ["input_ids", "labels", "length", "first_label"]


def table_of(examples: Sequence[Tokenized]) -> pa.Table:
    """Convert examples to Arrow columns, without a Python object per token."""
    import pyarrow as pa

    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int32)
    chunks = []
    for start in range(0, len(examples), _CHUNK_EXAMPLES):
        batch = examples[start : start + _CHUNK_EXAMPLES]
        offsets = np.concatenate([[0], np.cumsum(lengths[start : start + _CHUNK_EXAMPLES])]).astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, np.concatenate(values))
            for values in (
                [example.input_ids for example in batch],
                [example.labels for example in batch],
            )
        ]
        first = [_first_label(example) for example in batch]
        columns += [pa.array(lengths[start : start + _CHUNK_EXAMPLES]), pa.array(first, type=pa.int32())]
        chunks.append(pa.RecordBatch.from_arrays(columns, names=_COLUMNS))
    return pa.Table.from_batches(chunks)


def _first_label(example: Tokenized) -> int:
    """Return the position of the first scored token, or the length if there is none."""
    scored = np.flatnonzero(example.labels != IGNORED)
    return int(scored[0]) if len(scored) else len(example.labels)


def write_prepared(prepared: PreparedData, tables: dict[str, pa.Table], tokenizer: Any) -> None:
    """Write the folder atomically: next to its place, then renamed."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    making = prepared.path.with_name(f".{prepared.path.name}.{uuid.uuid4().hex}")
    try:
        making.mkdir(parents=True)
        for name, table in tables.items():
            Dataset(table).save_to_disk(str(making / name))
        tokenizer.save_pretrained(str(making / "tokenizer"))
        manifest = json.dumps(manifest_of(prepared), indent=1, ensure_ascii=False)
        (making / MANIFEST).write_text(manifest, encoding="utf-8")
        try:
            making.rename(prepared.path)
        except OSError:
            if not (prepared.path / MANIFEST).exists():
                raise
            # Another process was first; its content is the same.
    except OSError as error:
        raise UserError(
            f"the prepared data cannot be written to {prepared.path.parent}: {error.strerror or error}.",
            remedy="Free some space or choose another cache folder.",
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
