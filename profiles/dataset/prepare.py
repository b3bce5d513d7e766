"""Prepare the user's data: read, split, tokenize and cache it.  The entry point of this package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.build import build
from autosft.profiles.dataset.formats import DataFormat, Example, Passage
from autosft.profiles.dataset.model_tokenizer import ModelTokenizer, tokenizer_of
from autosft.profiles.dataset.prepared import (
    MANIFEST,
    PreparedData,
    load_prepared,
    require_embeddings,
    with_sources,
)
from autosft.profiles.dataset.problems import Problems, brief_list
from autosft.profiles.dataset.read_examples import ReadSources, read_sources, read_validation
from autosft.profiles.dataset.remarks import Remarks
from autosft.profiles.dataset.sources import Source, open_sources
from autosft.profiles.dataset.split import (
    MAX_HELD_OUT,
    Fold,
    SplitExamples,
    cut_passages,
    largest_sample,
    parse_fold,
    split_examples,
    weighted,
)
from autosft.profiles.dataset.template_date import parse_date, today
from autosft.profiles.errors import UserError

DEFAULT_BLOCK_SIZE = 1024

#: Yields (fingerprint, date) of known data; called only if the chat template writes today's date.
KnownDates = Callable[[], Iterable[tuple[str, str]]]

#: Incremented when the same input gives other tokens than before, which invalidates older caches.
_CACHE_VERSION = 3
#: The previous version, whose studies are resumed on their prepared data while these are cached.
_EARLIER_CACHE_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What determines the prepared data besides data and tokenizer; see `prepare`."""

    seed: int
    eval_share: float
    final_share: float
    skip_bad_records: bool
    max_rounds: int | None
    block_size: int
    max_positions: int | None
    train_rounds: tuple[int, ...]  # ascending, without repetitions
    fold: Fold | None

    @property
    def fingerprinted(self) -> tuple[Any, ...]:
        """The settings as part of the fingerprint: changing their order or form invalidates caches."""
        return (
            self.seed,
            self.eval_share,
            self.final_share,
            self.skip_bad_records,
            self.max_rounds,
            self.block_size,
            self.max_positions,
            *((self.train_rounds,) if self.train_rounds else ()),
            *(() if self.fold is None else (f"fold {self.fold}",)),
        )


def prepare(
    data: str,
    *,
    model: str,
    cache_dir: Path,
    eval_data: str | None = None,
    seed: int = 0,
    eval_share: float = 0.10,
    final_share: float = 0.05,
    fold: str | None = None,
    skip_bad_records: bool = False,
    max_rounds: int | None = None,
    train_rounds: Sequence[int] = (),
    block_size: int | None = None,
    max_positions: int | None = None,
    num_embeddings: int | None = None,
    template_date: str | None = None,
    known_dates: KnownDates = tuple,
    trust_remote_code: bool = False,
) -> PreparedData:
    """Read, check, split and tokenize training data, or return it from the cache.

    data               file, folder or hub name, or several separated by commas, with optional weights:
                       `a.jsonl:2` uses its records twice as often as those of others
    eval_data          the same, or None: a folder's validation files, else examples held out of `data`
    model              folder or hub id with the tokenizer
    cache_dir          holds the resulting folder, named by a fingerprint of everything that determines it
    seed               chooses the held-out examples, by content: the order of the records does not matter
    eval_share         share of examples to compare trials on (at most 500), above 0 and at most 0.25
    final_share        share for the final score (at most 500), never used to choose; same bounds
    fold               `2/5`: compare trials on the second of five equal parts, chosen by content as above
    skip_bad_records   skip and count bad records, instead of refusing the data
    max_rounds         keep only the first rounds of a conversation (a round: a user turn and its answer)
    train_rounds       searched numbers of rounds: the training examples are prepared once for each,
                       while evaluation examples stay whole
    block_size         tokens per block of plain text (default: 1024, at most the model's longest)
    max_positions      the model's longest position; longer examples are cut there
    num_embeddings     rows of the model's embedding; larger token ids are refused
    template_date      the date (ISO 8601) for chat templates that write today's
    known_dates        yields (fingerprint, date) of data prepared before: without `template_date`, the
                       date of the first match is used, else the one that the model was trained with, if
                       its tokenizer records it, else today's

    Raises `UserError` for data, model or cache folder that cannot be used.  Several processes may prepare the
    same data at once.
    """
    settings = _Settings(
        seed=seed,
        eval_share=eval_share,
        final_share=final_share,
        skip_bad_records=skip_bad_records,
        max_rounds=max_rounds,
        block_size=_checked_block_size(block_size, max_positions),
        max_positions=max_positions,
        train_rounds=tuple(sorted(set(train_rounds))),
        fold=None if fold is None else parse_fold(fold),
    )
    _refuse_unusable(settings)
    sources = open_sources(data)
    eval_sources = () if eval_data is None else open_sources(eval_data, is_evaluated=True)
    tokenizer = tokenizer_of(model, trust_remote_code=trust_remote_code)
    identity = (sources, eval_sources, tokenizer, settings)
    fingerprint, date = _identity(*identity, template_date=template_date, known_dates=known_dates)
    folder = cache_dir / "datasets" / fingerprint[:24]
    if not (folder / MANIFEST).exists():
        problems, remarks = Problems(skip=skip_bad_records), Remarks()
        described, parts = _read(
            sources, eval_sources, settings, problems=problems, remarks=remarks, names=(data, eval_data)
        )
        build(
            folder,
            parts,
            tokenizer=tokenizer.load(),
            model=model,
            sources=described,
            fingerprint=fingerprint,
            block_size=settings.block_size,
            train_rounds=settings.train_rounds,
            max_positions=max_positions,
            problems=problems,
            remarks=remarks,
            template_date=date,
            said=tokenizer.notes,
        )
    prepared = with_sources(load_prepared(folder), data, eval_data, model, sources)
    return prepared if num_embeddings is None else require_embeddings(prepared, num_embeddings)


def _refuse_unusable(settings: _Settings) -> None:
    for name, share in (("evaluation", settings.eval_share), ("final", settings.final_share)):
        if not 0 < share <= 0.25:
            raise UserError(f"the {name} share must be above 0 and at most 0.25, not {share}.")
    max_rounds = settings.max_rounds
    if max_rounds is not None and max_rounds < 1:
        raise UserError(f"at least one round of a conversation must be kept, not {max_rounds}.")
    assert all(count >= 1 for count in settings.train_rounds)
    assert max_rounds is None or not settings.train_rounds


def _identity(
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    tokenizer: ModelTokenizer,
    settings: _Settings,
    *,
    template_date: str | None,
    known_dates: KnownDates,
) -> tuple[str, str | None]:
    """Return the fingerprint of the prepared data, and the date for its chat template, if it needs one."""

    def fingerprint_with(date: str | None, version: int = _CACHE_VERSION) -> str:
        return _fingerprint(
            version,
            _sources_fingerprint(sources),
            _sources_fingerprint(eval_sources) if eval_sources else None,
            tokenizer.fingerprint(),
            settings.fingerprinted + (() if date is None else (f"template date {date}",)),
        )

    earlier = fingerprint_with(None, _EARLIER_CACHE_VERSION)
    if not tokenizer.writes_date():
        is_known = any(fingerprint == earlier for fingerprint, _ in known_dates())
        return (earlier if is_known else fingerprint_with(None)), None
    return _dated(fingerprint_with, template_date, known_dates, tokenizer.trained_date(), earlier=earlier)


def _read(
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    settings: _Settings,
    *,
    problems: Problems,
    remarks: Remarks,
    names: tuple[str, str | None],
) -> tuple[list[tuple[str, DataFormat, float]], SplitExamples]:
    """Read and split all sources; return name, format and weight of each training source, and the examples.

    `names` are the training and evaluation data as given, for messages.
    """
    read = read_sources(sources, problems, remarks, max_rounds=settings.max_rounds)
    given_eval = _given_evaluation(
        sources, eval_sources, problems, remarks, max_rounds=settings.max_rounds, seed=settings.seed
    )
    if given_eval is not None:
        if settings.fold is not None:
            raise UserError(
                f"--fold {settings.fold}: {names[1] or 'the validation data'} is evaluated on already.",
                remedy="Give either --fold or evaluation data of your own.",
            )
        _refuse_other_kind(given_eval, read, names[1] or "the validation data", names[0])
    weights = [source.weight for source in sources]
    described = [
        (source.name, data_format, source.weight)
        for source, data_format in zip(sources, read.formats, strict=True)
    ]
    return described, _split(read, given_eval, weights, settings)


def _split(
    read: ReadSources, given_eval: ReadSources | None, weights: Sequence[float], settings: _Settings
) -> SplitExamples:
    """Split the examples, and repeat training examples by the weights of their sources."""
    block_size = settings.block_size
    parts = split_examples(
        _in_passages(read.examples, block_size),
        None if given_eval is None else _in_passages(given_eval.examples, block_size),
        seed=settings.seed,
        eval_share=settings.eval_share,
        final_share=settings.final_share,
        fold=settings.fold,
    )
    return replace(parts, train=weighted(parts.train, weights, seed=settings.seed))


def _dated(
    fingerprint_with: Callable[[str | None], str],
    given: str | None,
    known_dates: KnownDates,
    trained: str | None,
    *,
    earlier: str,
) -> tuple[str, str]:
    """Return fingerprint and date of data whose chat template writes today's; arguments as in `prepare`."""
    if given is None:
        for fingerprint, date in known_dates():
            # Data of versions that stored no date have a fingerprint without it.
            if fingerprint in (fingerprint_with(date), fingerprint_with(None), earlier):
                return fingerprint, date
    date = trained or today() if given is None else parse_date(given)
    return fingerprint_with(date), date


def _given_evaluation(
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    problems: Problems,
    remarks: Remarks,
    *,
    max_rounds: int | None,
    seed: int,
) -> ReadSources | None:
    """Read evaluation data: the given sources, else validation files if all sources have some."""
    validation = [path.name for source in sources for path in source.validation]
    listed = brief_list(validation, 4)
    if eval_sources:
        if validation:
            remarks.said.append(f"not read, other data is given to evaluate on: {listed}")
        return read_sources(eval_sources, problems, remarks, max_rounds=max_rounds, is_evaluated=True)
    if not validation:
        return None
    if not all(source.validation for source in sources):
        remarks.said.append(f"not read, not all sources have validation data: {listed}")
        return None
    read = read_validation(sources, problems, remarks, max_rounds=max_rounds)
    kept = largest_sample(read.examples, MAX_HELD_OUT, seed=seed)
    num_read = len(read.examples)
    of_all = "" if len(kept) == num_read else f", {len(kept):,} of their {num_read:,} examples"
    remarks.said.append(f"evaluated on, not trained on: {listed}{of_all}")
    return replace(read, examples=kept)


def _refuse_other_kind(given_eval: ReadSources, read: ReadSources, eval_data: str, data: str) -> None:
    """Refuse evaluation data that is tokenized differently; Alpaca and ShareGPT are both conversations."""
    if {type(example) for example in given_eval.examples} <= {type(example) for example in read.examples}:
        return
    raise UserError(
        f"{eval_data} holds {given_eval.formats[0].label}, {data} {read.formats[0].label}: "
        "training and evaluation data would be of different kinds.",
        remedy="Give evaluation data of the same kind, or none, to hold some of the data out.",
    )


def _in_passages(examples: Sequence[Example], block_size: int) -> Sequence[Example]:
    documents = [example for example in examples if isinstance(example, Passage)]
    if not documents:
        return examples
    others = [example for example in examples if not isinstance(example, Passage)]
    return [*others, *cut_passages(documents, block_size)]


def _sources_fingerprint(sources: Sequence[Source]) -> str:
    """Return the sha256 (hex) of contents and weights of sources, in order."""
    content = [[source.fingerprint, source.weight] for source in sources]
    if len(sources) == 1 and sources[0].weight == 1.0:
        return sources[0].fingerprint
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _checked_block_size(block_size: int | None, max_positions: int | None) -> int:
    longest = max_positions or DEFAULT_BLOCK_SIZE
    if block_size is None:
        return min(DEFAULT_BLOCK_SIZE, longest)
    if block_size < 2:
        raise UserError(f"a block of text must have at least 2 tokens, not {block_size}.")
    if max_positions is not None and block_size > max_positions:
        raise UserError(
            f"a block of {block_size:,} tokens is longer than the model's longest, {max_positions:,}.",
            remedy=f"Pass --block-size {max_positions} or less.",
        )
    return block_size


def _fingerprint(
    cache_version: int, data: str, eval_data: str | None, tokenizer: str, options: tuple[Any, ...]
) -> str:
    libraries = [version("transformers"), version("tokenizers")]  # which render and tokenize
    content = [cache_version, libraries, data, eval_data, tokenizer, options]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
