"""Asks models for answers, in a separate process that may use torch."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autosft.profiles.child_python import python
from autosft.profiles.dataset.prepared import load_prepared
from autosft.profiles.errors import UserError
from autosft.profiles.own_folders import cache_folder
from autosft.profiles.sources import mark_in, require_base, require_base_of_adapter
from autosft.studies.files.checkpoints import verify_if_sealed
from autosft.studies.files.remote import is_url
from autosft.studies.files.study_folder import fetched_with_progress
from autosft.studies.report import Answer
from autosft.studies.results.summary import best_trial
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.values import Direction, StudySpec

Conversation = Sequence[Mapping[str, str]]
#: What the server says while it works on an answer.
_PARTIAL = {"text", "share"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model and its display name."""

    name: str  # "base", "best", "trial 7", or as given
    source: str  # folder or hub id


class InferenceClient:
    """Models that generate answers, in a separate process that ends with the `with` block."""

    def __init__(
        self,
        models: Sequence[NamedModel],
        *,
        trust_remote_code: bool = False,
        template_date: str | None = None,
    ) -> None:
        """Chat templates that write today's date write `template_date`, by default that of training.

        Raises UserError if a checkpoint of ours is damaged, or if its base is not where it was.
        """
        for model in models:
            verify_if_sealed(Path(model.source))
            require_base_of_adapter(Path(model.source))
        self._models = list(models)
        self._trust_remote_code = trust_remote_code
        self._template_date = template_date
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            python("-m", "autosft.workers.scoring.inference_server"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl+C is ours alone: it ends an answer, not the process
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, conversations: Sequence[Conversation], *, max_new_tokens: int) -> list[list[str]]:
        """Return each model's answers to all conversations, which end with a user's turn.

        Raises UserError if a model cannot be loaded or does not fit next to the others.
        """
        request = {"conversations": conversations, "max_new_tokens": max_new_tokens}
        answers: list[list[str]] = self._serve(self._models, request)["answers"]
        return answers

    def ask_one(
        self,
        model: NamedModel,
        conversation: Conversation,
        *,
        max_new_tokens: int,
        on_text: Callable[[str], object],
    ) -> str:
        """Return one model's answer to one conversation; `on_text` is called with each piece as it comes.

        `stop`, called meanwhile from a signal's handler, ends the answer where it is.
        """
        request = {"conversations": [conversation], "max_new_tokens": max_new_tokens, "streams": True}
        answer: str = self._serve([model], request, on_text=on_text)["answers"][0][0]
        return answer

    def stop(self) -> None:
        """End the answer that is being given."""
        self._send({"stop": True})

    def samples(
        self,
        data_dir: Path,
        num: int,
        *,
        max_new_tokens: int,
        on_share: Callable[[float], object] = lambda _: None,
    ) -> tuple[Answer, ...]:
        """Return evaluation examples of prepared data with the models' answers.

        `on_share` is called with the share of the answers that is done, as it grows.
        """
        request = {"data_dir": str(data_dir), "num_samples": num, "max_new_tokens": max_new_tokens}
        reply = self._serve(self._models, request, on_share=on_share)
        names = [model.name for model in self._models]
        return tuple(
            Answer(
                prompt=prompt,
                turns=tuple((role, text) for role, text in turns),
                expected=expected,
                answers=tuple(zip(names, texts, strict=True)),
            )
            for (prompt, expected), turns, texts in zip(
                reply["samples"], reply["turns"], zip(*reply["answers"], strict=True), strict=True
            )
        )

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _serve(
        self,
        models: Sequence[NamedModel],
        request: Mapping[str, Any],
        *,
        on_text: Callable[[str], object] = lambda _: None,
        on_share: Callable[[float], object] = lambda _: None,
    ) -> dict[str, Any]:
        assert self._process.stdout is not None
        whole = {
            **request,
            "models": [model.source for model in models],
            "beside": [model.source for model in self._models],
            "trust_remote_code": self._trust_remote_code,
            "template_date": self._template_date,
        }
        reply: dict[str, Any]
        try:
            self._send(whole)
            while (reply := json.loads(line := self._process.stdout.readline() or "{}")).keys() & _PARTIAL:
                if "text" in reply:
                    on_text(reply["text"])
                else:
                    on_share(reply["share"])
        except BrokenPipeError:
            line = ""
        if line in ("", "{}"):
            self._log.seek(0)
            last = [*self._log.read().strip().splitlines(), "it was killed"][-1]
            raise UserError(
                f"the inference process has ended: {last}.", remedy="Compare fewer or smaller models."
            )
        if "trust_remote_code" in reply.get("error", ""):
            raise UserError(
                "the models cannot answer: one of them needs to run its own code.",
                remedy="Review that code, then pass --trust-remote-code.",
            )
        if "error" in reply:
            raise UserError(f"the models cannot answer: {reply['error']}.")
        return reply


# Which models, which data


def models_of_study(study: StudyRecords, names: Sequence[str]) -> tuple[NamedModel, ...]:
    """Return the models that `--compare` names: base, best, a trial's number, a folder or a hub id.

    Raises UserError for a checkpoint that does not exist.
    """
    return tuple(NamedModel(name=_shown(name), source=_source(study, name)) for name in names)


def _shown(name: str) -> str:
    return f"trial {name}" if name.isdigit() else name


def _source(study: StudyRecords, name: str) -> str:
    if name == "base":
        return base_of(study.spec)
    trials = study.trials()
    if name == "best":
        trial = best_trial(trials, maximize=study.spec.direction is Direction.MAXIMIZE)
    elif name.isdigit():
        trial = trials[int(name)] if int(name) < len(trials) else None
    else:
        return name
    checkpoint = None if trial is None else trial.best_checkpoint
    known = {record.path for record in study.checkpoints()}
    if checkpoint is not None and is_url(checkpoint) and checkpoint in known:
        return str(fetched_with_progress(checkpoint))
    if checkpoint is None or not Path(checkpoint).is_dir():
        here = [record for record in study.checkpoints() if is_url(record.path) or Path(record.path).is_dir()]
        kept = sorted({record.trial for record in here})
        raise UserError(
            f"study {study.spec.name!r} has no checkpoint of {_shown(name)} on this machine.",
            remedy=f"Checkpoints are kept of trials {', '.join(map(str, kept))}." if kept else None,
        )
    return checkpoint


def base_of(spec: StudySpec) -> str:
    """Return the model that a study trains.  Raises UserError if it has been moved or replaced."""
    return require_base(spec.model, mark_in(spec.environment), of=f"study {spec.name!r}")


def prepared_folder(spec: StudySpec) -> Path:
    """Return the prepared data of a study.  Raises UserError if it is no longer in the cache."""
    folder = cache_folder() / "data" / "datasets" / spec.data_fingerprint[:24]
    try:
        return load_prepared(folder).path
    except OSError as error:
        raise UserError(
            f"the prepared data of study {spec.name!r} is not on this machine ({folder}).",
            remedy="autosft tune or autosft train with this data prepares it again.",
        ) from error
