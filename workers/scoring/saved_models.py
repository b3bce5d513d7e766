"""Scores a saved model: loss on prepared examples, perplexity of a text, IFEval, lm-eval's tasks, a function.

Every score comes with a 95 % interval where one can be given; what it covers is the draw of the examples.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from autosft.profiles.dataset.ifeval_prompts import Prompt
from autosft.profiles.dataset.prepared import PreparedData, Split
from autosft.profiles.errors import UserError
from autosft.profiles.model.gguf import tokenizer_home
from autosft.studies.files.checkpoints import verify_if_sealed
from autosft.studies.results.intervals import Z95, mean_interval, ratio_error
from autosft.studies.results.racing import wilson_interval
from autosft.workers.data import collator
from autosft.workers.device import local_device
from autosft.workers.load_weights import load_any
from autosft.workers.scoring.evaluation import evaluate
from autosft.workers.scoring.generation import batch_that_fits, generate
from autosft.workers.scoring.ifeval import IfevalScore, check_here
from autosft.workers.scoring.ifeval import score as score_prompts
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


def load(checkpoint: str, *, trust_remote_code: bool) -> LoadedModel:
    """Load a model folder, an adapter's folder, or a hub id onto the GPU, if there is one.

    Raises UserError for a folder that cannot be loaded, and for a checkpoint of ours that is not whole.
    """
    from transformers.utils import logging

    verify_if_sealed(Path(checkpoint))
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_home(checkpoint), trust_remote_code=trust_remote_code
        )
        model = load_any(checkpoint, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{checkpoint} cannot be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model=model.to(local_device().torch_name).eval(), tokenizer=tokenizer)


def loss_scores(
    loaded: LoadedModel, data: PreparedData, splits: Sequence[Split], *, seq_len: int | None
) -> list[Score]:
    """Score splits of prepared data: loss in nats a token and perplexity, over examples."""
    from datasets import concatenate_datasets, load_from_disk

    dataset = concatenate_datasets([load_from_disk(str(data.split_dir(one))) for one in splits])
    seq_len = seq_len or max(dataset["length"])
    result = evaluate(
        with_fused_head(loaded),
        dataset,
        collate=collator(loaded.tokenizer, seq_len),
        micro_batch=4,
        device=loaded.model.device,
    )
    pairs = [(loss, count) for loss, count in zip(result.loss_sums, result.num_tokens, strict=True) if count]
    return loss_and_perplexity(result.loss, ratio_error(result.loss, pairs), len(pairs))


def text_scores(loaded: LoadedModel, file: Path) -> list[Score]:
    """Score running text by a sliding window, each token once."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    window = min(longest or LONGEST_WINDOW, LONGEST_WINDOW)
    ids = loaded.tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    found = score_tokens(with_fused_head(loaded), ids, window=window, stride=max(1, window // 2))
    return loss_and_perplexity(found.loss, found.standard_error, None, note=f"{found.num_tokens:,} tokens")


def with_fused_head(loaded: LoadedModel) -> PreTrainedModel:
    """Return the model with trl's fused head, so that no logits are held."""
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    if not loaded.has_fused_head:
        is_adapted = isinstance(loaded.model, PeftModel)
        base = loaded.model.get_base_model() if is_adapted else loaded.model
        add_fused_lm_head(base, outputs=("log_probs", "is_top1"))
        loaded.has_fused_head = True
    return loaded.model


def loss_and_perplexity(
    loss: float, error: float, num_examples: int | None, *, note: str = ""
) -> list[Score]:
    """Return a loss and its perplexity with their intervals."""
    half = Z95 * error if math.isfinite(error) else None
    low, high = (None, None) if half is None else (loss - half, loss + half)
    bounds = [None if one is None else math.exp(min(one, 700.0)) for one in (low, high)]
    return [
        Score(metric="eval_loss", value=loss, low=low, high=high, num_examples=num_examples, note=note),
        Score(
            metric="perplexity",
            value=math.exp(min(loss, 700.0)),
            low=bounds[0],
            high=bounds[1],
            num_examples=num_examples,
            note=note,
        ),
    ]


def ask_ifeval(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    incumbent: Sequence[bool] | None = None,
    on_batch: Callable[[], object] | None = None,
) -> IfevalScore:
    """Let a model answer IFEval's prompts in batches that fit, and check the answers."""
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
            on_batch=on_batch,
        )

    if loaded.tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, so it cannot be asked.",
            remedy="Use a checkpoint of autosft, which saves one, or add chat_template.jinja to the folder.",
        )
    return score_prompts(prompts, ask, check=check_here, incumbent=incumbent)


def ifeval_scores(found: IfevalScore, num_prompts: int) -> list[Score]:
    """Return IFEval's four scores; those of instructions without an interval, since they come in prompts."""
    asked = len(found.strict)
    note = f"given up after {asked} of {num_prompts} prompts; estimated" if found.is_raced else ""
    by_name = dict(found.metrics())
    low, high = wilson_interval(sum(found.passes), asked)
    strict = Score(
        metric="ifeval",
        value=found.value,
        low=None if found.is_raced else low,
        high=None if found.is_raced else high,
        num_examples=asked,
        note=note,
    )
    loose = by_name["ifeval_prompt_loose"]
    low, high = wilson_interval(loose * asked, asked)
    return [
        strict,
        Score(metric="ifeval_prompt_loose", value=loose, low=low, high=high, num_examples=asked, note=note),
        *(
            Score(metric=name, value=by_name[name], num_examples=asked, note=note)
            for name in ("ifeval_inst_strict", "ifeval_inst_loose")
        ),
    ]


def function_scores(loaded: LoadedModel, name: str) -> list[Score]:
    """Call a user's `function(model, tokenizer)`: it returns a number, or one an example.

    `name` is "package.module.function".  Raises UserError where there is none or it returns something else.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--metric python:{name}: {error}.",
            remedy="Write it as python:package.module.function, importable from this folder.",
        ) from error
    result = function(loaded.model, loaded.tokenizer)
    try:
        if isinstance(result, int | float):
            return [Score(metric=attribute, value=float(result))]
        values = [float(one) for one in result]
        mean = statistics.fmean(values)
    except (TypeError, ValueError, statistics.StatisticsError) as error:
        raise UserError(
            f"--metric python:{name} returned {type(result).__name__}, not a number or numbers."
        ) from error
    low = high = None
    if len(values) > 1:
        low, high = mean_interval(mean, statistics.stdev(values) / math.sqrt(len(values)), len(values))
    return [Score(metric=attribute, value=mean, low=low, high=high, num_examples=len(values))]
