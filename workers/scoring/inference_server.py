"""Answer prompts with models: greedy decoding, in batches.

`python -m autosft.workers.scoring.inference_server` reads a JSON request per line from standard input
and writes a line of JSON for each, for commands that hold no tensors.  Models stay loaded
between requests.

    {"models": [...], "conversations": [[message, ...], ...], "max_new_tokens": n}  -> {"answers": [[...]]}
    {"models": [...], "data_dir": "...", "num_samples": n, "max_new_tokens": n}     -> and "samples", "turns"
    anything that goes wrong                                                        -> {"error": "..."}

With "streams": true a request of one model and one conversation is first answered by lines {"text": "..."}
with what is new; a line {"stop": true} meanwhile ends the answer where it is.  "beside" names all models that
are compared: they are loaded in one precision, and share a chat template where some have none.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.dataset.template_date import recorded_date
from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.errors import UserError
from autosft.workers.device import local_device, use_free_cores
from autosft.workers.load_weights import load_any
from autosft.workers.scoring.generation import generate_after, prompt_tokens, stream_after
from autosft.workers.scoring.precision import common_dtype
from autosft.workers.scoring.prompt_turns import turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]
Tokens = list[int]

#: Evaluation examples with longer prompts are not shown as samples.
MAX_SAMPLE_PROMPT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to answer."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(model: str, *, trust_remote_code: bool = False, dtype: str | None = None) -> Loaded:
    """Load a model folder (an adapter's brings its base with it) or a hub model, on a GPU if there is one.

    `dtype` as of `precision.common_dtype`, which is asked where none is given.
    """
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    name = dtype or common_dtype([model])
    number = name if name == "auto" else getattr(torch, name)
    network = load_any(model, dtype=number, trust_remote_code=trust_remote_code)
    return Loaded(network.to(local_device().torch_name).eval(), tokenizer)


def generate(
    loaded: Loaded,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    on_token: Callable[[], object] | None = None,
) -> list[str]:
    """Return a model's answer to each prompt, in the order given."""
    return generate_after(
        loaded.network,
        loaded.tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_token=on_token,
    )


def answer(model: str, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
    """Return the answers of the model in folder `model` to conversations; run by `starters.call`."""
    loaded = load(model)
    prompts = [tokens_of(conversation, loaded.tokenizer, None) for conversation in conversations]
    return generate(loaded, prompts, max_new_tokens=max_new_tokens)


def tokens_of(
    conversation: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    date: str | None = None,
) -> Tokens:
    """Return a conversation as a prompt; without a chat template, the prompt is its last message.

    Template and date are those of `generation.prompt_tokens`.
    """
    if tokenizer.chat_template is None and template is None:
        return list(tokenizer(conversation[-1]["content"], return_token_type_ids=False)["input_ids"])
    return prompt_tokens(conversation, tokenizer, template, date=date)


def samples_of(data_dir: str, num: int) -> tuple[list[Tokens], list[Tokens]]:
    """Return prompts and expected answers of evaluation examples, evenly spread over the prepared data.

    The prompt of a conversation is what comes before its first scored token, the answer its first scored
    span.  Examples that are scored from their start, such as plain text, are cut in the middle.
    """
    from datasets import load_from_disk

    rows = load_from_disk(f"{data_dir}/eval").with_format(None)
    usable = [i for i, first in enumerate(rows["first_label"]) if first <= MAX_SAMPLE_PROMPT_TOKENS]
    num = min(num, len(usable))
    chosen = [usable[i * len(usable) // num] for i in range(num)]
    prompts, expected = [], []
    for row in (rows[i] for i in chosen):
        ids, labels, first = row["input_ids"], row["labels"], row["first_label"]
        if first <= 1:
            first = min(len(ids) // 2, MAX_SAMPLE_PROMPT_TOKENS)
        end = next((i for i in range(first, len(ids)) if labels[i] == -100), len(ids))
        prompts.append(ids[:first])
        expected.append(ids[first:end])
    return prompts, expected


class Answerer:
    """Serves requests; a model is loaded by the first request that names it."""

    def __init__(
        self, *, say: Callable[[dict[str, Any]], object] = lambda _: None, is_stopped: Event | None = None
    ) -> None:
        """`say` receives what an answer that streams goes on with; `is_stopped` ends it."""
        self._loaded: dict[tuple[str, str], Loaded] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._say, self._is_stopped = say, is_stopped or Event()

    def serve(self, request: Mapping[str, Any]) -> dict[str, Any]:
        beside = request.get("beside") or request["models"]  # all that are compared with each other
        trust = request.get("trust_remote_code", False)
        tokenizers = [self._tokenizer(name, trust) for name in beside]
        dtype = common_dtype(beside)
        models = [self._load(name, trust, dtype) for name in request["models"]]
        limit = request["max_new_tokens"]
        if "data_dir" in request:
            prompts, expected = samples_of(request["data_dir"], request["num_samples"])
            decode = models[-1].tokenizer.batch_decode
            texts = [decode(ids, skip_special_tokens=True) for ids in (prompts, expected)]
            samples = [[prompt.strip(), answer.strip()] for prompt, answer in zip(*texts, strict=True)]
            answers = self._answers(models, prompts, max_new_tokens=limit)
            turns = [turns_of(ids, models[-1].tokenizer) for ids in prompts]
            return {"answers": answers, "samples": samples, "turns": turns}
        # An untuned base model may lack the template that its tuned child was trained with, and its date.
        template = next((each.chat_template for each in tokenizers if each.chat_template), None)
        dates = (request.get("template_date"), *map(recorded_date, tokenizers))
        date = next(filter(None, dates), None)
        if request.get("streams"):
            [model], [conversation] = models, request["conversations"]
            prompt = tokens_of(conversation, model.tokenizer, template, date)
            return {"answers": [[self._stream(model, prompt, max_new_tokens=limit)]]}
        return {
            "answers": [
                generate(
                    model,
                    [tokens_of(each, model.tokenizer, template, date) for each in request["conversations"]],
                    max_new_tokens=limit,
                )
                for model in models
            ]
        }

    def _answers(
        self, models: Sequence[Loaded], prompts: Sequence[Tokens], *, max_new_tokens: int
    ) -> list[list[str]]:
        """Return each model's answers; says after each token which share of them is done."""
        answers: list[list[str]] = []
        for model in models:
            tokens = count(1)

            def tell(number: int = len(answers), tokens: Iterator[int] = tokens) -> None:
                share = min(1.0, next(tokens) / max_new_tokens)  # beyond one batch it is not known
                self._say({"share": (number + share) / len(models)})

            answers.append(generate(model, prompts, max_new_tokens=max_new_tokens, on_token=tell))
        return answers

    def _stream(self, model: Loaded, prompt: Tokens, *, max_new_tokens: int) -> str:
        """Say an answer as it grows, and return all of it, or what there is when it is stopped."""
        self._is_stopped.clear()
        return stream_after(
            model.network,
            model.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            say=lambda text: self._say({"text": text}),
            is_stopped=self._is_stopped.is_set,
        )

    def _tokenizer(self, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(name, trust_remote_code=trust_remote_code)
        return self._tokenizers[name]

    def _load(self, name: str, trust_remote_code: bool, dtype: str) -> Loaded:
        if (name, dtype) not in self._loaded:
            self._loaded[name, dtype] = load(name, trust_remote_code=trust_remote_code, dtype=dtype)
        return self._loaded[name, dtype]


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # keeps what libraries print out of the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the client's, which asks to stop
    asked: SimpleQueue[str | None] = SimpleQueue()
    is_stopped = Event()

    def say(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    def listen() -> None:
        for line in sys.stdin:
            if "stop" in json.loads(line):
                is_stopped.set()
            else:
                asked.put(line)
        asked.put(None)

    Thread(target=listen, daemon=True).start()
    use_free_cores()
    answerer = Answerer(say=say, is_stopped=is_stopped)
    while (line := asked.get()) is not None:
        try:
            answer = answerer.serve(json.loads(line))
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # reported to the client, which may go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)


if __name__ == "__main__":
    main()
