"""Scores a model on IFEval's prompts, in training at each evaluation, raced against the best so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autosft.profiles.dataset.ifeval_prompts import read_prompts
from autosft.profiles.recipe import Precision
from autosft.studies.files.checkpoints import prompt_scores_path
from autosft.studies.results.losses import read_passes
from autosft.studies.trial import PromptScoring, TrialJob
from autosft.workers.scoring.generation import batch_that_fits, generate
from autosft.workers.scoring.ifeval import CheckerProcess, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

#: What stays on the device during generation, by component names of a MemoryEstimate.
RESIDENT = ("parameters", "optimizer state", "gradients")


AUTOCAST = (Precision.BF16_AUTOCAST, Precision.FP16_AUTOCAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A model that answers prompts, in the precision of its evaluations."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of_trainer(cls, trainer: SFTTrainer) -> Answering:
        """Return the model in training."""
        return cls(
            model=trainer.accelerator.unwrap_model(trainer.model),
            tokenizer=trainer.processing_class,
            precision=trainer.compute_loss_context_manager,
        )


class PromptScorer:
    """Scores the checkpoints of one attempt; the best so far is the incumbent."""

    def __init__(self, job: TrialJob, scoring: PromptScoring) -> None:
        self.job, self.scoring = job, scoring
        self.prompts = read_prompts(scoring.prompts)
        self.check = CheckerProcess()  # its imports would count towards the trial's memory
        self.incumbent = None if scoring.incumbent is None else read_passes(Path(scoring.incumbent))
        parts = dict(job.plan.estimate.components)
        resident = sum(parts.get(name, 0) for name in RESIDENT)
        if job.settings.adapter is None and job.pinned.precision in AUTOCAST:
            # Autocast's 16-bit copies of trained weights; the gradients, freed by then, take twice that.
            resident += max(0, parts["parameters"] // 2 - parts.get("gradients", 0))
        self.free_bytes = max(0, job.plan.memory_cap_bytes - resident)

    def score(
        self, answering: Answering, evaluation: int, *, step: int, on_batch: Callable[[], object], keep: bool
    ) -> tuple[tuple[str, float], ...]:
        """Ask the prompts, save which were followed next to the evaluation, and return the metrics.

        All ranks of a gang ask the same prompts; only one of them sets `keep` and saves the result.
        """
        model, tokenizer = answering.model, answering.tokenizer
        dtype_bytes = next(model.parameters()).element_size()

        def batch_size(num_prompt_tokens: int) -> int:
            num_tokens = num_prompt_tokens + self.scoring.max_new_tokens
            return batch_that_fits(
                model.config, free_bytes=self.free_bytes, num_tokens=num_tokens, dtype_bytes=dtype_bytes
            )

        def ask(prompts: Sequence[str]) -> list[str]:
            return generate(
                model,
                tokenizer,
                [[{"role": "user", "content": prompt}] for prompt in prompts],
                max_new_tokens=self.scoring.max_new_tokens,
                batch_size=batch_size,
                precision=answering.precision(),
                on_batch=on_batch,
            )

        found = score(self.prompts, ask, check=self.check, incumbent=self.incumbent)
        if keep:
            found.save(prompt_scores_path(Path(self.job.output_dir), evaluation), step=step)
        if not found.is_raced and (self.incumbent is None or sum(found.passes) > sum(self.incumbent)):
            self.incumbent = found.passes
        return found.metrics()
