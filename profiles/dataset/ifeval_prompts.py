"""Read prompts of IFEval (Zhou et al. 2023): instructions whose compliance a program can check.

Read from the hub or from a local JSON or JSONL file with the data set's columns: key, prompt,
instruction_id_list, kwargs.  Nothing is checked or generated here; that is `autosft.workers.scoring.ifeval`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.hub import hub_answers
from autosft.profiles.errors import MissingExtraError, UserError

#: Instructions that lm-eval checks with NLTK's sentence tokenizer, whose data (punkt_tab) is not a package.
NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt with its checkable instructions."""

    key: int
    prompt: str
    instructions: tuple[str, ...]  # lm-eval's names: "punctuation:no_comma"
    arguments: tuple[Mapping[str, Any], ...]  # one mapping per instruction


def read_prompts(source: str) -> tuple[Prompt, ...]:
    """Read IFEval's prompts from a hub id or a local file.  Raises UserError with file and line."""
    path = Path(source).expanduser()
    if path.is_file():
        return tuple(from_record(where, record) for where, record in _records(path))
    if path.suffix in (".json", ".jsonl") or path.exists():
        raise UserError(f"--ifeval-data {source}: there is no such file.")
    import datasets

    is_online = hub_answers()
    if not is_online:  # load only from disk: the hub's client would retry for half a minute
        datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(source, split="train")
    except Exception as error:  # the hub's client and datasets raise their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"IFEval's prompts cannot be read from {source}: {reason if is_online else 'no hub here'}.",
            remedy="Give them as a local JSON file: --ifeval-data FILE",
        ) from error
    return tuple(from_record(f"{source} row {number}", dict(row)) for number, row in enumerate(rows, start=1))


def scorable(prompts: Sequence[Prompt], *, has_punkt: bool) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Drop instructions that cannot be checked here, and prompts with no others; return notes on it too."""
    if has_punkt:
        return tuple(prompts), ()
    counts = Counter(name for prompt in prompts for name in prompt.instructions if name in NEEDS_PUNKT)
    if not counts:
        return tuple(prompts), ()
    kept = [_without_punkt(prompt) for prompt in prompts]
    left = tuple(prompt for prompt in kept if prompt.instructions)
    names = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return left, (
        f"not scored, since NLTK's punkt_tab is not here: {names}; "
        f"{len(left):,} of {len(prompts):,} prompts are left. "
        "Where there is a network: python -m nltk.downloader punkt_tab",
    )


def has_punkt() -> bool:
    """Return whether NLTK's sentence tokenizer has its data.  Raises MissingExtraError without NLTK."""
    try:
        import nltk
    except ImportError as error:
        raise MissingExtraError(what="--metric ifeval", extra="eval") from error
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def shuffled(prompts: Sequence[Prompt], *, seed: int) -> tuple[Prompt, ...]:
    """Return the prompts in an order that depends on the seed only: any prefix is a fair sample."""
    ordered = sorted(prompts, key=lambda prompt: prompt.key)
    random.Random(seed).shuffle(ordered)
    return tuple(ordered)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts atomically as JSONL in IFEval's columns."""
    lines = [json.dumps(to_record(prompt), ensure_ascii=False) for prompt in prompts]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def to_record(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt in IFEval's columns."""
    return {
        "key": prompt.key,
        "prompt": prompt.prompt,
        "instruction_id_list": list(prompt.instructions),
        "kwargs": [dict(each) for each in prompt.arguments],
    }


def _without_punkt(prompt: Prompt) -> Prompt:
    kept = [at for at, name in enumerate(prompt.instructions) if name not in NEEDS_PUNKT]
    return Prompt(
        key=prompt.key,
        prompt=prompt.prompt,
        instructions=tuple(prompt.instructions[at] for at in kept),
        arguments=tuple(prompt.arguments[at] for at in kept),
    )


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, record) of a JSON list or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    try:
        if text.lstrip().startswith("["):
            records = [
                (f"{path} record {number}", prompt) for number, prompt in enumerate(json.loads(text), 1)
            ]
        else:
            # At newlines alone: within a string U+2028 and the like separate no records.
            records = [
                (f"{path} line {number}", _of_line(path, number, line))
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}.") from error
    if not records:
        raise UserError(f"{path} holds no prompt.")
    yield from records


def _of_line(path: Path, number: int, line: str) -> Any:
    """Read a JSON line.  Raises UserError that names the file's line."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {number}.") from error


def from_record(where: str, record: Any) -> Prompt:
    """Read a prompt in IFEval's columns; `where` names it in errors.  Raises UserError."""
    remedy = (
        "A record has key (a number), prompt, instruction_id_list (names of lm-eval's, such as "
        "punctuation:no_comma) and kwargs (a mapping for each of them), as google/IFEval does."
    )
    columns = ("key", "prompt", "instruction_id_list", "kwargs")
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: no prompt of IFEval, which is a mapping.", remedy=remedy)
    if missing := [name for name in columns if name not in record]:
        raise UserError(f"{where}: no prompt of IFEval, {', '.join(missing)} missing.", remedy=remedy)
    names, arguments = record["instruction_id_list"], record["kwargs"]
    if isinstance(arguments, str):  # as some exports hold it
        arguments = json.loads(arguments)
    if not names or len(names) != len(arguments):
        raise UserError(
            f"{where}: {len(names)} instructions with {len(arguments)} sets of arguments.", remedy=remedy
        )
    return Prompt(
        key=int(record["key"]),
        prompt=str(record["prompt"]),
        instructions=tuple(str(name) for name in names),
        # The hub's columns hold every argument of every instruction, most of them None.
        arguments=tuple({k: v for k, v in prompt.items() if v is not None} for prompt in arguments),
    )
