"""Score answers to IFEval's prompts with lm-eval's checks: strict and loose, per prompt and instruction.

`python -m autosft.workers.scoring.ifeval` checks answers for a process whose memory must not grow by
lm-eval's imports (some 50 MiB): it reads JSON lines {"prompt": ..., "answer": ...} and writes lines
{"strict": [...],
"loose": [...]}.
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
from autosft.studies.metrics import IFEVAL, METRICS
from autosft.studies.results.racing import BLOCK, estimated_score, is_hopeless

#: Reported besides the metric: per prompt and per instruction, with lm-eval's strict and loose checks.
PROMPT_STRICT = "ifeval_prompt_strict"
PROMPT_LOOSE = "ifeval_prompt_loose"
INSTRUCTION_STRICT = "ifeval_inst_strict"
INSTRUCTION_LOOSE = "ifeval_inst_loose"

Flags = tuple[tuple[bool, ...], tuple[bool, ...]]  # strict and loose, a flag per instruction
Check = Callable[[Prompt, str], Flags]


@dataclass(frozen=True, slots=True, kw_only=True)
class IfevalScore:
    """Which instructions a model followed: a tuple per prompt, in order, with a flag per instruction.

    `is_raced`: scoring was cut short because the incumbent was clearly better; later prompts were not asked,
    and `value` is an estimate.
    """

    strict: tuple[tuple[bool, ...], ...]
    loose: tuple[tuple[bool, ...], ...]
    value: float  # the share of all prompts whose instructions were all followed, strictly
    is_raced: bool = False
    answers: tuple[str, ...] = ()  # what was checked, in the same order

    @property
    def passes(self) -> tuple[bool, ...]:
        """For each prompt, whether all of its instructions were followed strictly."""
        return tuple(all(flags) for flags in self.strict)

    def metrics(self) -> tuple[tuple[str, float], ...]:
        """Return the scores by name; all but `ifeval` cover only the prompts that were asked."""
        return (
            (IFEVAL, self.value),
            (PROMPT_STRICT, _share(self.passes)),
            (INSTRUCTION_STRICT, _share([flag for flags in self.strict for flag in flags])),
            (PROMPT_LOOSE, _share([all(flags) for flags in self.loose])),
            (INSTRUCTION_LOOSE, _share([flag for flags in self.loose for flag in flags])),
            (METRICS[IFEVAL].count_name, float(len(self.strict))),
        )

    def save(self, path: Path, *, step: int) -> None:
        """Write flags and answers as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "step": step,
            "value": self.value,
            "is_raced": self.is_raced,
            "strict": self.strict,
            "loose": self.loose,
            "answers": self.answers,
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(whole))
        partial.replace(path)


def score(
    prompts: Sequence[Prompt],
    ask: Callable[[Sequence[str]], Sequence[str]],
    *,
    check: Check,
    incumbent: Sequence[bool] | None = None,
    block: int = BLOCK,
) -> IfevalScore:
    """Ask the prompts in blocks and check the answers; stop as soon as the incumbent is clearly better.

    `ask` returns the answers to prompts; `incumbent` holds the passes of the best checkpoint so far, prompt
    by prompt in the same order; `check` is `check_here` or a `CheckerProcess`.
    """
    assert prompts
    strict: list[tuple[bool, ...]] = []
    loose: list[tuple[bool, ...]] = []
    answers: list[str] = []
    is_raced = False
    for start in range(0, len(prompts), block):
        asked = prompts[start : start + block]
        for prompt, answer in zip(asked, ask([each.prompt for each in asked]), strict=True):
            checked = check(prompt, answer)
            strict.append(checked[0])
            loose.append(checked[1])
            answers.append(answer)
        passes = [all(flags) for flags in strict]
        if incumbent is not None and len(strict) < len(prompts) and is_hopeless(passes, incumbent):
            is_raced = True
            break
    return IfevalScore(
        strict=tuple(strict),
        loose=tuple(loose),
        value=estimated_score([all(flags) for flags in strict], incumbent if is_raced else None),
        is_raced=is_raced,
        answers=tuple(answers),
    )


def check_here(prompt: Prompt, answer: str) -> Flags:
    """Return which instructions an answer follows, strictly and loosely.

    Raises UserError for an instruction unknown to lm-eval.
    """
    utils = lm_eval_checks()
    known = utils.instructions_registry.INSTRUCTION_DICT
    for name in prompt.instructions:
        if name not in known:
            raise UserError(
                f"IFEval prompt {prompt.key}: lm-eval has no instruction {name!r}.",
                remedy=f"Known: {', '.join(sorted(known))}.",
            )
    given = utils.InputExample(
        key=prompt.key,
        instruction_id_list=list(prompt.instructions),
        prompt=prompt.prompt,
        kwargs=[dict(arguments) for arguments in prompt.arguments],
    )
    strict = utils.test_instruction_following_strict(given, answer)
    loose = utils.test_instruction_following_loose(given, answer)
    return tuple(map(bool, strict.follow_instruction_list)), tuple(map(bool, loose.follow_instruction_list))


@cache
def lm_eval_checks() -> Any:
    """Import lm-eval's checks without downloads, and make them deterministic.

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
    langdetect.DetectorFactory.seed = 0  # its guesses are random otherwise
    return utils


class CheckerProcess:
    """Checks answers in a separate process, started with the first answer; it ends with this process."""

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
    """Check the answers read from standard input, to end of file."""
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
