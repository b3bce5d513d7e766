"""`autosft export`: a configuration with its data, in the format of another tool."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.dataset.tokenizer import fit_pad, load_tokenizer
from autosft.profiles.dataset.turn_end import turn_end
from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import KINDS
from autosft.profiles.model.gguf import plain_folder
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.sources import mark_in, require_base
from autosft.scheduler.finish.weights import Weights, write_weights
from autosft.scheduler.train.config_inputs import read_inputs
from autosft.studies.export import ExportedConfig, write_config
from autosft.studies.export.card import model_card, public
from autosft.studies.export.formats import DataLayout, find_format, text_files
from autosft.studies.export.tools import Run, is_cpu_plan
from autosft.studies.export.writing import write_text
from autosft.studies.files.checkpoints import verify_if_sealed
from autosft.studies.trial import TrialJob
from autosft.workers.tools.scratch import sweep

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # number of examples written at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of an export."""

    folder: Path  # for `autosft`, the file
    command: str  # what to run next
    notes: tuple[str, ...] = ()  # what may be unexpected


def export_config(config: ExportedConfig, output: Path) -> Exported:
    """Write `best.yaml` into a folder, or as the given file.  Raises UserError."""
    path = output if output.suffix in (".yaml", ".yml") else output / "best.yaml"
    make_folder(path.parent)
    write_config(path, config)
    return Exported(folder=path, command=f"autosft train {path}")


def export_for_tool(
    config: ExportedConfig, tool: str, output: Path, *, launcher: str, trust_remote_code: bool = False
) -> Exported:
    """Write a folder that a tool can train from: its configuration, the data in order, start scripts.

    Raises UserError for an unknown format or one that does not support the configuration, if model or data
    are not those of the configuration, and for a folder that is not empty.
    """
    export_format = find_format(tool)
    export_format.check(config)
    make_folder(output, must_be_empty=True)
    model, data = read_inputs(config, trust_remote_code=trust_remote_code)
    if model.adapter is not None:
        raise UserError(
            f"--format {tool}: {config.model.name} is an adapter from which training continued, "
            f"which {tool} does not do.",
            remedy="--format autosft writes a best.yaml for autosft train.",
        )
    if model.quantization is not None:
        raise UserError(
            f"--format {tool}: {config.model.name} is stored quantized ({model.quantization}), and only "
            "autosft trains on its dequantized weights.",
            remedy="--format autosft writes a best.yaml for autosft train.",
        )
    # A GGUF file counts as a folder for other tools.
    loadable = replace(config, model=replace(config.model, name=plain_folder(config.model.name)))
    ends = write_tokenizer(data, model, output / "tokenizer")
    run, course = run_of(loadable, data, output)
    run = replace(run, turn_end=ends, trust_remote_code=trust_remote_code)
    write_data(course, data, config, output / "data")
    if export_format.data_layout is DataLayout.DATASET_DICT:
        as_dataset_dict(output / "data")
    write_text(output, text_files(export_format, run, launcher=launcher))
    write_config(output / "best.yaml", config)
    return Exported(folder=output, command=f"bash {output / 'run.sh'}")


def export_for_hub(
    config: ExportedConfig,
    weights: Weights,
    output: Path,
    *,
    merge: bool,
    keep_zeros: bool = False,
    dtype: str | None = None,
    sentences: Sequence[str],
) -> Exported:
    """Write a folder that can be uploaded: weights, tokenizer, model card.

    `merge` merges an adapter into its base's weights; with `keep_zeros` the base's zeros stay zero.  Whole
    models are written in `dtype`, by default that of the base's weights.  Raises UserError if there is
    nothing to merge, and for an incomplete checkpoint.
    """
    require_mergeable(config, merge=merge)
    verify_if_sealed(weights.checkpoint)
    if merge:
        require_base(config.model.name, mark_in(config.environment), of=f"study {config.study!r}")
    make_folder(output, must_be_empty=True)
    notes = write_weights(weights, output, merge=merge, dtype=dtype, keep_zeros=keep_zeros)
    write_card(config, output, is_merged=merge, sentences=(*sentences, *notes))
    return Exported(folder=output, command=f"hf upload USER/NAME {output}", notes=notes)


def require_mergeable(config: ExportedConfig, *, merge: bool) -> None:
    """Check that there is something to merge if a merge is requested.  Raises UserError."""
    adapter = config.settings.adapter
    if merge and adapter is None:
        raise UserError("--merge: this trial trained all weights, so there is no adapter to merge.")
    if merge and adapter is not None and not KINDS[adapter.kind].can_merge:
        raise UserError(
            f"--merge: {adapter.kind} does not change the weights, so there is nothing to merge into them.",
            remedy="Export the adapter without --merge; peft loads it over its base.",
        )


def write_card(config: ExportedConfig, output: Path, *, is_merged: bool, sentences: Sequence[str]) -> None:
    """Write the model card and the configuration that trains it again, without what tells of this machine."""
    assert config.plan is not None
    settings = config.settings
    run = Run(
        config=config,
        plan=config.plan,
        num_steps=max(1, settings.num_train_examples // settings.effective_batch_size),
        on_cpu=is_cpu_plan(config),
        own_template=False,
    )
    write_text(output, {"README.md": model_card(run, is_merged=is_merged, sentences=sentences)})
    write_config(output / "best.yaml", public(config))


def make_folder(folder: Path, *, must_be_empty: bool = False) -> None:
    """Create a folder.  Raises UserError if that fails, or if it has to be empty and is not.

    What an export that was killed has left in it is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if must_be_empty and any(folder.iterdir()):
            raise UserError(f"--output {folder} is not empty.", remedy="Choose a new or an empty folder.")
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}.", remedy="Choose another folder.") from error


# The data


def run_of(config: ExportedConfig, data: PreparedData, output: Path) -> tuple[Run, Dataset]:
    """Return what follows from a configuration and its data, and the run's examples in order."""
    from autosft.workers.training.example_order import order_examples

    if config.plan is None:
        raise UserError("this configuration has no plan.", remedy="Write it again with: autosft export STUDY")
    job = TrialJob(
        study=config.study,
        trial=config.trial,
        attempt=1,
        model=config.model.name,
        data_dir=str(data.path),
        output_dir=str(output),
        settings=config.settings,
        pinned=config.pinned,
        plan=config.plan,
        device_uuids=(),
        resume_from=None,
        save_resume_state=False,
        trust_remote_code=False,
    )
    course = order_examples(job)
    run = Run(
        config=config,
        plan=config.plan,
        num_steps=course.num_steps,
        on_cpu=is_cpu_plan(config),
        own_template=data.own_template,
    )
    return run, course.dataset


def write_tokenizer(data: PreparedData, model: ModelProfile, folder: Path) -> tuple[int, ...]:
    """Write the tokenizer that a run's data was prepared with; return the tokens that end a turn.

    Unchanged, except for a pad token without an embedding: other tools train with the tokenizer as it is.
    """
    tokenizer = load_tokenizer(
        str(data.tokenizer_dir), trust_remote_code=model.trust_remote_code, is_checked=True
    )
    if data.pad_token_id is not None and data.pad_token_id >= model.vocab_size:
        fit_pad(tokenizer, model.vocab_size)
        tokenizer.save_pretrained(folder)
    else:
        shutil.copytree(data.tokenizer_dir, folder)
    return turn_end(tokenizer).token_ids


def write_data(course: Dataset, data: PreparedData, config: ExportedConfig, folder: Path) -> None:
    """Write the run's examples in order and the evaluation examples, truncated as they are used."""
    from datasets import load_from_disk

    folder.mkdir()
    evaluation = load_from_disk(str(data.path / "eval"))
    eval_len = config.pinned.eval_seq_len
    scored = [i for i, first in enumerate(evaluation["first_label"]) if first < eval_len]
    write_parquet(course, folder / "train.parquet", seq_len=config.settings.seq_len)
    write_parquet(evaluation.select(scored), folder / "test.parquet", seq_len=eval_len)


def write_parquet(dataset: Dataset, path: Path, *, seq_len: int) -> None:
    """Write token ids, attention mask and labels of all examples, truncated to `seq_len`, in batches."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def cut(column: Any, item: Any) -> Any:
        return pc.list_slice(column.combine_chunks(), 0, seq_len).cast(pa.list_(item))

    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "attention_mask": pa.list_(pa.int8()),
            "labels": pa.list_(pa.int64()),
        }
    )
    with pq.ParquetWriter(path, schema) as writer:
        for batch in dataset.with_format("arrow").iter(batch_size=BATCH):
            ids, labels = cut(batch.column("input_ids"), pa.int32()), cut(batch.column("labels"), pa.int64())
            ones = pa.array([1] * len(ids.values), pa.int8())
            mask = pa.ListArray.from_arrays(ids.offsets, ones)
            writer.write_table(pa.table([ids, mask, labels], schema=schema))


def as_dataset_dict(folder: Path) -> None:
    """Convert the data files to the format that LLaMA-Factory's `tokenized_path` reads."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset

    disable_progress_bars()
    names = {"train": "train.parquet", "validation": "test.parquet"}
    files = {split: str(folder / name) for split, name in names.items()}
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        data = load_dataset("parquet", data_files=files, cache_dir=cache)
        DatasetDict(data).save_to_disk(str(folder / "tokenized"))
    for file in files.values():
        Path(file).unlink()


__all__ = ["Exported", "export_config", "export_for_hub", "export_for_tool"]
