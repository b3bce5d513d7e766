"""The export formats, one row each, for the command line and the writers."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import describe_adapter
from autosft.profiles.recipe import Method
from autosft.studies.export.config import ExportedConfig
from autosft.studies.export.tools import (
    Run,
    axolotl_differences,
    axolotl_fields,
    has_config_fields,
    llamafactory_fields,
    trainer_fields,
    trl_fields,
)
from autosft.studies.export.writing import as_yaml, bash, powershell, start_command, training_script

Files = Mapping[str, str]  # text by file name


class Content(enum.Enum):
    """What an export contains besides the format's own files."""

    CONFIG = "config"  #: nothing but `best.yaml`
    DATA = "data"  #: the run's examples in order, the tokenizer, scripts that start the tool
    WEIGHTS = "weights"  #: a checkpoint, its tokenizer, a model card


class DataLayout(enum.Enum):
    """The layout of the examples in `data/`."""

    PARQUET = "parquet"
    DATASET_DICT = "dataset_dict"  #: a `DatasetDict` on disk, as LLaMA-Factory's `tokenized_path` expects


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFormat:
    """A format of `autosft export`: its name, its contents, and which configurations it supports.

    `files` returns the tool's own text files, for formats with data.  They are started in the export's folder
    by `command` or, if that is empty, as a script by the launcher that the user chooses.
    """

    name: str
    summary: str  # one line of help
    content: Content
    files: Callable[[Run], Files] | None = None
    command: str = ""
    data_layout: DataLayout = DataLayout.PARQUET
    methods: frozenset[Method] = frozenset(Method) - {Method.SPARSE}  # only autosft preserves zeros
    takes_every_adapter: bool = False  # False: only plain LoRA, which the tool's configuration can express
    dtypes: tuple[str, ...] = ()  # in which weights can be written
    is_of_weights_alone: bool = False  # it exports a model without a study too

    @property
    def has_launcher(self) -> bool:
        """Whether it is started by the launcher that --launcher chooses."""
        return self.content is Content.DATA and not self.command

    def check(self, config: ExportedConfig) -> None:
        """Check that the format supports a configuration.  Raises UserError."""
        remedy = "--format autosft writes a best.yaml for autosft train"
        if config.settings.method not in self.methods:
            is_sparse = config.settings.method is Method.SPARSE
            why = " (only autosft keeps zeros of pruned models zero)" if is_sparse else ""
            raise UserError(
                f"--format {self.name}: it cannot train --method {config.settings.method.value}{why}.",
                remedy=f"{remedy}.",
            )
        adapter = config.settings.adapter
        if adapter is not None and not self.takes_every_adapter and not has_config_fields(adapter):
            raise UserError(
                f"--format {self.name}: its configuration has no place for {describe_adapter(adapter)}.",
                remedy=f"{remedy}, --format transformers a script.",
            )


def text_files(export_format: ExportFormat, run: Run, *, launcher: str) -> dict[str, str]:
    """Return an export's text files by name: the tool's own, and scripts that start it."""
    assert export_format.files is not None
    command = export_format.command or start_command(launcher, run)
    return {
        **export_format.files(run),
        "run.sh": bash(command, run),
        "run.ps1": powershell(command, run),
    }


def _transformers_files(run: Run) -> Files:
    arguments = {**trainer_fields(run), "output_dir": "output"}
    return {
        "training_arguments.json": json.dumps(arguments, indent=2) + "\n",
        "train.py": training_script("transformers", run),
    }


_ALL_METHODS = frozenset(Method)

#: All formats by name.
FORMATS: dict[str, ExportFormat] = {
    row.name: row
    for row in (
        ExportFormat(
            name="autosft",
            summary="best.yaml, for autosft train on any machine",
            content=Content.CONFIG,
            methods=_ALL_METHODS,
            takes_every_adapter=True,
        ),
        ExportFormat(
            name="trl",
            summary="for trl sft --config",
            content=Content.DATA,
            files=lambda run: {"sft.yaml": as_yaml(trl_fields(run), run)},
            command="trl sft --config sft.yaml",
        ),
        ExportFormat(
            name="transformers",
            summary="a script with transformers' Trainer",
            content=Content.DATA,
            files=_transformers_files,
            takes_every_adapter=True,
        ),
        ExportFormat(
            name="axolotl",
            summary="for axolotl train",
            content=Content.DATA,
            files=lambda run: {
                "axolotl.yaml": as_yaml(axolotl_fields(run), run, remarks=axolotl_differences(run))
            },
            command="axolotl train axolotl.yaml",
        ),
        ExportFormat(
            name="llamafactory",
            summary="for llamafactory-cli train",
            content=Content.DATA,
            files=lambda run: {"llamafactory.yaml": as_yaml(llamafactory_fields(run), run)},
            command="llamafactory-cli train llamafactory.yaml",
            data_layout=DataLayout.DATASET_DICT,
        ),
        ExportFormat(
            name="script",
            summary="a script with trl's SFTTrainer",
            content=Content.DATA,
            files=lambda run: {"train.py": training_script("trl", run)},
            takes_every_adapter=True,
        ),
        ExportFormat(
            name="hub",
            summary="weights, tokenizer and model card, to be uploaded",
            content=Content.WEIGHTS,
            methods=_ALL_METHODS,
            takes_every_adapter=True,
            dtypes=("f32", "f16", "bf16"),
        ),
        ExportFormat(
            name="gguf",
            summary="a GGUF file for llama.cpp and a Modelfile for Ollama",
            content=Content.WEIGHTS,
            methods=_ALL_METHODS,
            takes_every_adapter=True,
            dtypes=("f32", "f16", "bf16", "q8_0"),
            is_of_weights_alone=True,
        ),
        ExportFormat(
            name="gguf-adapter",
            summary="a LoRA adapter for llama.cpp, to be applied to its base model",
            content=Content.WEIGHTS,
            takes_every_adapter=True,
            dtypes=("f32", "f16", "bf16"),
            is_of_weights_alone=True,
        ),
        ExportFormat(
            name="vllm",
            summary="an adapter or, with --merge, a model, and the command that serves it",
            content=Content.WEIGHTS,
            methods=_ALL_METHODS,
            takes_every_adapter=True,
            dtypes=("f32", "f16", "bf16"),
            is_of_weights_alone=True,
        ),
    )
}


def find_format(name: str) -> ExportFormat:
    """Return a format.  Raises UserError that lists the known ones."""
    if name not in FORMATS:
        raise UserError(f"--format {name}: not a format.", remedy=f"Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def formats_with(content: Content) -> tuple[str, ...]:
    """Return the names of the formats with this content."""
    return tuple(row.name for row in FORMATS.values() if row.content is content)


def formats_with_dtype(dtype: str) -> tuple[str, ...]:
    """Return the names of the formats that write weights in a dtype."""
    return tuple(row.name for row in FORMATS.values() if dtype in row.dtypes)


def formats_with_launcher() -> tuple[str, ...]:
    """Return the names of the formats that a launcher starts."""
    return tuple(row.name for row in FORMATS.values() if row.has_launcher)
