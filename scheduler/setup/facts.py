"""The inputs of a study's design besides its request, read and measured beforehand so that design is pure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datasets import load_from_disk

from autosft.profiles.dataset.prepared import PreparedData, Split, choose_seq_len, eval_fingerprint
from autosft.profiles.dataset.sources import short_name
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.recipe import Generation
from autosft.profiles.user_code import UserCode, find
from autosft.profiles.user_trainer import find_trainer
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.setup.prompt_set import PromptSet, longest_answers
from autosft.studies.request import TuneRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFacts:
    """Hardware, model, data and code of a study, as far as its design depends on them."""

    hardware: ClusterProfile
    model: ModelProfile
    data: PreparedData
    models: Models  # of memory and time
    data_name: str  # short, used in the name of the study
    default_seq_len: int  # tokens: the shortest length that truncates few training examples
    eval_fingerprint: Callable[[int], str]  # truncation length -> sha256 of the evaluation tokens
    loss: UserCode | None = None  # of the user
    trainer: UserCode | None = None  # of the user
    prompts: PromptSet | None = None  # prompts that checkpoints answer
    generation: Generation | None = None  # the longest of these prompts and answers
    is_mps_on: bool = False  # whether NVIDIA's MPS daemon is running on this machine

    @property
    def longest(self) -> int:
        """Return the maximum sequence length that can be trained on, in tokens."""
        return self.model.max_positions or self.data.train.longest


def read_facts(
    request: TuneRequest,
    hardware: ClusterProfile,
    *,
    model: ModelProfile,
    data: PreparedData,
    models: Models,
    prompts: PromptSet | None,
) -> StudyFacts:
    """Read the inputs of the design of a study.  Raises UserError for user code that cannot be used."""

    @cache
    def fingerprint(seq_len: int) -> str:
        return eval_fingerprint(load_from_disk(str(data.split_dir(Split.EVAL))), seq_len)

    return StudyFacts(
        hardware=hardware,
        model=model,
        data=data,
        models=models,
        data_name=short_name(data.source),
        default_seq_len=choose_seq_len(data, model.max_positions or data.train.longest).seq_len,
        eval_fingerprint=fingerprint,
        loss=None if request.loss is None else find(request.loss, flag="--loss"),
        trainer=None if request.trainer is None else find_trainer(request.trainer),
        prompts=prompts,
        generation=None if prompts is None else longest_answers(prompts, data),
        is_mps_on=is_mps_on(),
    )


def is_mps_on(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether NVIDIA's MPS control daemon is running on this machine, judged by its pipe."""
    # where the daemon itself puts it by default
    folder = environment.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # nosec B108
    return (Path(folder) / "control").exists()
