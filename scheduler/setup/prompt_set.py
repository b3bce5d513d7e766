"""The prompts that a study's checkpoints answer, for a metric of prompts; fixed before its first trial."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.dataset.ifeval_prompts import (
    Prompt,
    has_punkt,
    read_prompts,
    scorable,
    shuffled,
    write_prompts,
)
from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.dataset.template_bounds import bounded_template
from autosft.profiles.dataset.template_date import pin_date
from autosft.profiles.dataset.template_parts import with_parts
from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.errors import MissingExtraError, UserError
from autosft.profiles.recipe import Generation
from autosft.profiles.units import duration
from autosft.scheduler.decide.cost_models import Answers
from autosft.studies.export import ExportedConfig
from autosft.studies.intervals import proportion
from autosft.studies.metrics import Metric, prompt_metric
from autosft.studies.request import TuneRequest
from autosft.studies.trial import ExecutionPlan, PromptScoring

#: For English text and common byte-pair vocabularies.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of a study, in the order in which they are asked."""

    metric: Metric
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    notes: tuple[str, ...]  # what cannot be scored here

    @property
    def file_name(self) -> str:
        """Return the name of the file of prompts in a study's folder."""
        return f"{self.metric.name}.jsonl"

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over everything that decides a score."""
        return hashlib.sha256(repr((self.prompts, self.max_new_tokens)).encode()).hexdigest()

    @property
    def answers(self) -> Answers:
        """Return what predicts the time of answering them once; prompts count as English text."""
        characters = sum(len(prompt.prompt) for prompt in self.prompts)
        return Answers(
            num_prompts=len(self.prompts),
            mean_prompt_tokens=characters / CHARACTERS_PER_TOKEN / len(self.prompts),
            max_new_tokens=self.max_new_tokens,
        )

    def written_to(self, folder: Path) -> PromptScoring:
        """Write the prompts into the folder of a study or a run; return what its attempts have to score."""
        path = folder / self.file_name
        write_prompts(path, self.prompts)
        return PromptScoring(prompts=str(path), max_new_tokens=self.max_new_tokens)

    def lines(self, plan: ExecutionPlan) -> tuple[str, ...]:
        """Describe what is asked, how precise a score is, and how long answering takes."""
        assert self.metric.benchmark is not None
        num = len(self.prompts)
        known = proportion(round(num / 4), num)
        return (
            f"{self.metric.benchmark.title}: {num:,} prompts at each evaluation, answers of at most "
            f"{self.max_new_tokens:,} tokens; "
            "checkpoints that are clearly worse than the best so far are abandoned early.",
            f"        With {num:,} prompts, the 95 % interval of a score of 25 % is {known.low:.1%} to "
            f"{known.high:.1%}, and the best of many trials looks better than it is. "
            f"{answering_time(plan, num)}",
            *(f"        {note}" for note in self.notes),
        )


def read_prompt_set(request: TuneRequest) -> PromptSet | None:
    """Read the prompts that a request's metric needs; return None if it needs none.

    Raises MissingExtraError without lm-eval, and UserError for prompts that cannot be read.
    """
    metric = prompt_metric(request.metric)
    if metric is None:
        return None
    return prompt_set(
        metric,
        getattr(request, metric.data_setting),
        max_new_tokens=getattr(request, metric.length_setting),
        seed=request.seed,
    )


def prompt_set(metric: Metric, source: str, *, max_new_tokens: int, seed: int) -> PromptSet:
    """Read prompts from a hub id or a file, in an order that depends on `seed`.

    Raises the errors of `read_prompt_set`.
    """
    assert metric.benchmark is not None
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError(what=f"--metric {metric.name}", extra=metric.benchmark.extra)
    prompts, notes = scorable(read_prompts(source), has_punkt=has_punkt())
    return PromptSet(
        metric=metric, prompts=shuffled(prompts, seed=seed), max_new_tokens=max_new_tokens, notes=notes
    )


def prompts_again(config: ExportedConfig) -> PromptSet | None:
    """Read the prompts that a configuration was chosen by, None if it has none or the user wants none.

    Raises UserError if they have changed: scores on different prompts cannot be compared.
    """
    given, pinned, metric = config.prompts, config.pinned, prompt_metric(config.expected.metric)
    if given is None or given.source == "none" or metric is None:
        return None
    found = prompt_set(metric, given.source, max_new_tokens=given.max_new_tokens, seed=given.seed)
    if found.fingerprint == pinned.prompts_fingerprint:
        return found
    raise UserError(
        f"the {len(found.prompts):,} prompts of {given.source} that can be scored here are not those that "
        f"this configuration was found with (sha256 {found.fingerprint[:12]}…, expected "
        f"{(pinned.prompts_fingerprint or 'none')[:12]}…).",
        remedy=f"Point {metric.data_flag} at the original prompts, or train without asking "
        f"them: {metric.data_flag} none" + "".join(f"\nHere {note}" for note in found.notes),
    )


def longest_answers(given: PromptSet, data: PreparedData) -> Generation:
    """Return the longest prompt, in tokens of the study's tokenizer, and the longest answer."""
    tokenizer = load_tokenizer(str(data.tokenizer_dir), is_checked=True)
    pin_date(tokenizer, data.template_date)
    asked = [[{"role": "user", "content": prompt.prompt}] for prompt in given.prompts]
    template = with_parts(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    with bounded_template():
        texts = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, chat_template=template
        )
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Generation(prompt_tokens=max(map(len, ids)), new_tokens=given.max_new_tokens)


def answering_time(plan: ExecutionPlan, num_prompts: int) -> str:
    """Describe the predicted maximum time for answering; racing and short answers shorten it."""
    if plan.run_time is None:
        return "The predictions above do not include the time for answering."
    return (
        f"Answering all {num_prompts:,} takes about {duration(plan.run_time.answers_s)} (predicted, if some "
        "answers are as long as they may be), which the times above include."
    )
