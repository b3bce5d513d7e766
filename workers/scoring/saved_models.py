"""Score a saved model: loss on prepared examples, perplexity of a text, IFEval, lm-eval's tasks, a function.

Scores have a 95 % interval where possible; it covers the sampling of the examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autosft.profiles.dataset.ifeval_prompts import Prompt
from autosft.profiles.dataset.prepared import PreparedData, Split
from autosft.profiles.dataset.template_date import pin_date, recorded_date
from autosft.profiles.dataset.tokenizer import Say, fit_pad, load_tokenizer, say_nothing
from autosft.profiles.dataset.turn_end import set_turn_end
from autosft.profiles.errors import UserError
from autosft.profiles.sources import require_base_of_adapter
from autosft.profiles.user_code import import_user_module
from autosft.studies.files.checkpoints import verify_if_sealed
from autosft.studies.intervals import Interval, mean, proportion
from autosft.studies.metrics import IFEVAL, TokenSums, token_metrics
from autosft.workers.data import collator
from autosft.workers.device import local_device, use_free_cores
from autosft.workers.load_weights import load_any
from autosft.workers.scoring.evaluation import Evaluation, evaluate
from autosft.workers.scoring.generation import batch_that_fits, generate
from autosft.workers.scoring.ifeval import (
    INSTRUCTION_LOOSE,
    INSTRUCTION_STRICT,
    PROMPT_LOOSE,
    Flags,
    IfevalScore,
    check_here,
)
from autosft.workers.scoring.ifeval import score as score_prompts
from autosft.workers.scoring.own_loss import require_own_loss
from autosft.workers.scoring.perplexity import score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WINDOW = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number for a model."""

    metric: str
    value: float
    low: float | None = None  # 95 % interval
    high: float | None = None
    num_examples: int | None = None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model in memory, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_fused_head: bool = field(default=False)


def load(
    checkpoint: str,
    *,
    trust_remote_code: bool,
    template_date: str | None = None,
    dtype: str = "auto",
    say: Say = say_nothing,
) -> LoadedModel:
    """Load a model folder, an adapter's folder, or a hub id onto the GPU, if there is one.

    `dtype` is torch's name of the weights' type, "auto" for that in which they are stored.

    The model stops generating at the end of its turn; a chat template that contains today's date uses
    `template_date`, or else the date that the model was trained with.  `say` receives a sentence for each
    irregularity.

    Raises UserError for a folder that cannot be loaded, and for an incomplete checkpoint of autosft.
    """
    from transformers.utils import logging

    use_free_cores()
    verify_if_sealed(Path(checkpoint))
    require_base_of_adapter(Path(checkpoint))
    logging.disable_progress_bar()
    try:
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code, say=say)
        number = dtype if dtype == "auto" else getattr(torch, dtype)
        model = load_any(checkpoint, dtype=number, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{checkpoint} cannot be loaded: it contains code that has to be run.",
                remedy="Review that code, then pass --trust-remote-code.",
            ) from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{checkpoint} cannot be loaded: {reason}") from error
    pin_date(tokenizer, template_date or recorded_date(tokenizer))
    fit_pad(tokenizer, model.get_input_embeddings().num_embeddings, name=checkpoint, say=say)
    set_turn_end(model, tokenizer)
    return LoadedModel(model=model.to(local_device().torch_name).eval(), tokenizer=tokenizer)


def loss_scores(
    loaded: LoadedModel, data: PreparedData, splits: Sequence[Split], *, seq_len: int | None
) -> list[Score]:
    """Score splits of prepared data by every token-level metric."""
    return token_scores(evaluate_splits(loaded, data, splits, seq_len=seq_len))


#: Examples of a batch in which prepared data is scored.
SPLIT_BATCH = 4


def evaluate_splits(
    loaded: LoadedModel,
    data: PreparedData,
    splits: Sequence[Split],
    *,
    seq_len: int | None,
    on_batch: Callable[[], object] | None = None,
) -> Evaluation:
    """Evaluate a model on splits of prepared data, example by example, in batches of SPLIT_BATCH."""
    from datasets import concatenate_datasets, load_from_disk

    dataset = concatenate_datasets([load_from_disk(str(data.split_dir(split))) for split in splits])
    seq_len = seq_len or max(dataset["length"])
    return evaluate(
        with_fused_head(loaded),
        dataset,
        collate=collator(loaded.tokenizer, seq_len),
        micro_batch=SPLIT_BATCH,
        device=loaded.model.device,
        on_batch=on_batch,
    )


def evaluate_text(loaded: LoadedModel, file: Path) -> Evaluation:
    """Evaluate a model on running text by a sliding window, each token once; a window is an example."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    window = min(longest or LONGEST_WINDOW, LONGEST_WINDOW)
    ids = loaded.tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return score_tokens(with_fused_head(loaded), ids, window=window, stride=max(1, window // 2))


def with_fused_head(loaded: LoadedModel) -> PreTrainedModel:
    """Return the model with trl's fused head, which does not store logits."""
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    if not loaded.has_fused_head:
        is_adapted = isinstance(loaded.model, PeftModel)
        base = loaded.model.get_base_model() if is_adapted else loaded.model
        add_fused_lm_head(base, outputs=("log_probs", "is_top1"))
        require_own_loss(loaded.model, str(loaded.model.config.name_or_path))
        loaded.has_fused_head = True
    return loaded.model


def token_scores(found: TokenSums, *, note: str = "") -> list[Score]:
    """Return every token-level metric with its interval."""
    return [
        scored(metric.name, interval, note=note)
        for metric in token_metrics()
        if (interval := metric.interval(found)) is not None
    ]


def scored(name: str, interval: Interval, *, note: str = "") -> Score:
    """Return a score from its value's interval; unknown ends become None."""
    return Score(
        metric=name,
        value=interval.value,
        low=interval.low if interval.is_known else None,
        high=interval.high if interval.is_known else None,
        num_examples=interval.num_examples or None,
        note=note,
    )


def ask_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    incumbent: Sequence[bool] | None = None,
    on_answer: Callable[[], object] | None = None,
) -> IfevalScore:
    """Let a model answer prompts in batches that fit in memory, and check the answers."""
    dtype_bytes = next(loaded.model.parameters()).element_size()

    def batch_size(num_prompt_tokens: int) -> int:
        return batch_that_fits(
            loaded.model.config,
            free_bytes=local_device().free_bytes(),
            num_tokens=num_prompt_tokens + max_new_tokens,
            dtype_bytes=dtype_bytes,
        )

    def ask(texts: Sequence[str]) -> list[str]:
        return generate(
            loaded.model,
            loaded.tokenizer,
            [[{"role": "user", "content": text}] for text in texts],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    def check(prompt: Prompt, answer: str) -> Flags:
        flags = check_here(prompt, answer)
        if on_answer is not None:
            on_answer()
        return flags

    if loaded.tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, so it cannot be asked.",
            remedy="Use a checkpoint of autosft, which saves one, or add chat_template.jinja to the folder.",
        )
    return score_prompts(prompts, ask, check=check, incumbent=incumbent)


def prompt_scores(found: IfevalScore, num_prompts: int) -> list[Score]:
    """Return the prompt metric and its companions; per-instruction scores have no interval."""
    asked = len(found.strict)
    note = f"stopped after {asked} of {num_prompts} prompts; estimated" if found.is_raced else ""
    values = dict(found.metrics())
    if found.is_raced:
        strict = Score(metric=IFEVAL, value=found.value, num_examples=asked, note=note)
    else:
        strict = scored(IFEVAL, proportion(sum(found.passes), asked))
    num_loose = sum(all(flags) for flags in found.loose)
    return [
        strict,
        scored(PROMPT_LOOSE, proportion(num_loose, asked), note=note),
        *(
            Score(metric=name, value=values[name], num_examples=asked, note=note)
            for name in (INSTRUCTION_STRICT, INSTRUCTION_LOOSE)
        ),
    ]


def function_scores(loaded: LoadedModel, name: str) -> list[Score]:
    """Call a user's `function(model, tokenizer)`: it returns a number, or a number per example.

    `name` is "package.module.function".  Raises UserError if it does not exist or returns anything else.
    """
    module_name, dot, attribute = name.rpartition(".")
    remedy = "Write it as python:package.module.function, importable from this folder."
    if not dot:
        raise UserError(f"--metric python:{name} names no module.", remedy=remedy)
    module = import_user_module(module_name, Path.cwd(), what=f"--metric python:{name}")
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"--metric python:{name}: {module_name} has no function {attribute}.", remedy=remedy)
    result = function(loaded.model, loaded.tokenizer)
    try:
        if isinstance(result, int | float):
            return [Score(metric=attribute, value=float(result))]
        interval = mean([float(value) for value in result])
    except (TypeError, ValueError, statistics.StatisticsError) as error:
        raise UserError(
            f"--metric python:{name} returned {type(result).__name__}, not a number or numbers."
        ) from error
    return [scored(attribute, interval)]
