"""Scores answers to IFEval's prompts with lm-eval's checks: strict and loose, a prompt and an instruction.

`python -m autosft.workers.scoring.ifeval` checks answers for a process that must not grow by what lm-eval
imports (some 50 MiB): a JSON line {"prompt": ..., "answer": ...} in, a line {"strict": [...], "loose":
[...]} out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autosft.profiles.child_python import python
from autosft.profiles.dataset.ifeval_prompts import Prompt, from_record, to_record
from autosft.profiles.errors import MissingExtraError, UserError
from autosft.studies.results.racing import BLOCK, estimated_score, is_hopeless

#: As lm-eval's task has it.
MAX_NEW_TOKENS = 1280


Flags = tuple[tuple[bool, ...], tuple[bool, ...]]  # strict and loose, a flag an instruction
Check = Callable[[Prompt, str], Flags]


@dataclass(frozen=True, slots=True, kw_only=True)
class IfevalScore:
    """What a model followed: a tuple a prompt, in the order in which they were asked, a flag an instruction.

    `is_raced` says that the race was given up: later prompts were not asked, and `value` is estimated.
    """

    strict: tuple[tuple[bool, ...], ...]
    loose: tuple[tuple[bool, ...], ...]
    value: float  # of all prompts: the share whose instructions are all followed, strictly
    is_raced: bool = False

    @property
    def passes(self) -> tuple[bool, ...]:
        """Whether each prompt was followed strictly and in all its instructions."""
        return tuple(all(flags) for flags in self.strict)

    def metrics(self) -> tuple[tuple[str, float], ...]:
        """Return the scores by name; all but `ifeval` are over the prompts that were asked."""
        return (
            ("ifeval", self.value),
            ("ifeval_prompt_strict", _share(self.passes)),
            ("ifeval_inst_strict", _share([flag for flags in self.strict for flag in flags])),
            ("ifeval_prompt_loose", _share([all(flags) for flags in self.loose])),
            ("ifeval_inst_loose", _share([flag for flags in self.loose for flag in flags])),
            ("ifeval_prompts", float(len(self.strict))),
        )

    def save(self, path: Path, *, step: int) -> None:
        """Write the flags as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "step": step,
            "value": self.value,
            "is_raced": self.is_raced,
            "strict": self.strict,
            "loose": self.loose,
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(whole))
        partial.replace(path)


def read_passes(path: Path) -> tuple[bool, ...] | None:
    """Return what a saved score followed strictly; None where it is missing, broken, or a lost race."""
    try:
        plain = json.loads(path.read_text())
        return None if plain["is_raced"] else tuple(all(flags) for flags in plain["strict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def score(
    prompts: Sequence[Prompt],
    ask: Callable[[Sequence[str]], Sequence[str]],
    *,
    check: Check,
    incumbent: Sequence[bool] | None = None,
    block: int = BLOCK,
) -> IfevalScore:
    """Ask the prompts in blocks and check the answers; give up as soon as the incumbent is clearly better.

    `ask` answers prompts; `incumbent` is what the best checkpoint so far passes, prompt by prompt in the
    same order; `check` is `check_here` or a `CheckerProcess`.
    """
    assert prompts
    strict: list[tuple[bool, ...]] = []
    loose: list[tuple[bool, ...]] = []
    is_raced = False
    for start in range(0, len(prompts), block):
        asked = prompts[start : start + block]
        for one, answer in zip(asked, ask([each.prompt for each in asked]), strict=True):
            checked = check(one, answer)
            strict.append(checked[0])
            loose.append(checked[1])
        passes = [all(flags) for flags in strict]
        if incumbent is not None and len(strict) < len(prompts) and is_hopeless(passes, incumbent):
            is_raced = True
            break
    return IfevalScore(
        strict=tuple(strict),
        loose=tuple(loose),
        value=estimated_score([all(flags) for flags in strict], incumbent if is_raced else None),
        is_raced=is_raced,
    )


def check_here(prompt: Prompt, answer: str) -> Flags:
    """Return which instructions an answer follows, strictly and loosely.

    Raises UserError for an instruction that lm-eval does not know.
    """
    utils = lm_eval_checks()
    known = utils.instructions_registry.INSTRUCTION_DICT
    for name in prompt.instructions:
        if name not in known:
            raise UserError(
                f"IFEval prompt {prompt.key}: lm-eval knows no instruction {name!r}.",
                remedy=f"Known: {', '.join(sorted(known))}.",
            )
    given = utils.InputExample(
        key=prompt.key,
        instruction_id_list=list(prompt.instructions),
        prompt=prompt.prompt,
        kwargs=[dict(one) for one in prompt.arguments],
    )
    strict = utils.test_instruction_following_strict(given, answer)
    loose = utils.test_instruction_following_loose(given, answer)
    return tuple(map(bool, strict.follow_instruction_list)), tuple(map(bool, loose.follow_instruction_list))


@cache
def lm_eval_checks() -> Any:
    """Import lm-eval's checks without letting them download anything, and make them repeatable.

    Raises MissingExtraError.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"  # on other ranks than 0 nothing is downloaded at import
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise MissingExtraError(what="IFEval", extra="eval") from error
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
    langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise
    return utils


class CheckerProcess:
    """Checks answers in a process of its own, started at the first one; it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, prompt: Prompt, answer: str) -> Flags:
        if self._process is None:
            self._process = subprocess.Popen(
                python("-m", "autosft.workers.scoring.ifeval"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": to_record(prompt), "answer": answer}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that checks IFEval's answers has died; see above")
        told = json.loads(line)
        if "error" in told:
            raise UserError(told["error"], remedy=told["remedy"])
        return tuple(told["strict"]), tuple(told["loose"])

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def main() -> None:
    """Check the answers on standard input until it ends."""
    for line in sys.stdin:
        given = json.loads(line)
        try:
            strict, loose = check_here(from_record("a prompt", given["prompt"]), given["answer"])
            told: dict[str, Any] = {"strict": strict, "loose": loose}
        except UserError as error:
            told = {"error": error.message, "remedy": error.remedy}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


if __name__ == "__main__":
    main()
