"""Query llama.cpp (package xllamacpp) about a GGUF file, in a separate process.

`python -m autosft.workers.tools.gguf_engine FILE REQUEST REPLY` reads and writes JSON files; a crash in
native code ends only that process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError

#: A token with this logit bias is always the next one.
_CERTAIN = 1000.0
_TIMEOUT_S = 600
_ASSERTED = re.compile(r"GGML_ASSERT\(.*\) failed")
_LOG_HEAD = re.compile(r"^[\d.]+ [EWI]\s+")  # "0.00.026.566 E ": when, and how bad


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Queries for the engine."""

    texts: tuple[str, ...] = ()  # to be tokenized, including special tokens
    rows: tuple[tuple[int, ...], ...] = ()  # prompts, for the log-probabilities of what follows each
    num_likeliest: int = 256  # how many of them
    ends: tuple[int, ...] = ()  # tokens that should end an answer
    conversations: tuple[Mapping[str, Any], ...] = ()  # {"messages": ..., "tools": ...}
    adapter: str | None = None  # file of an adapter that is applied to the model
    chat_template: str | None = None  # used instead of the one in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The engine's answers, in the same order."""

    tokens: list[list[int]]
    log_probabilities: list[dict[int, float]]  # the likeliest, by token; empty after a rejected prompt
    row_refusals: list[str]
    ends: list[bool]
    rendered: list[str | None]  # None for a rejected conversation
    rendered_tokens: list[list[int]]  # tokens of what it rendered for a prompt
    refusals: list[str]


def is_here() -> bool:
    """Return whether the engine is installed."""
    return find_spec("xllamacpp") is not None


def ask(file: Path, asked: Asked) -> Said:
    """Query the engine.  Raises UserError if it does not load the file, or crashes."""
    with tempfile.TemporaryDirectory(prefix="autosft-engine-") as scratch:
        request, reply = Path(scratch) / "request.json", Path(scratch) / "reply.json"
        request.write_text(json.dumps(asdict(asked)), encoding="utf-8")
        done = subprocess.run(
            python("-m", "autosft.workers.tools.gguf_engine", str(file), str(request), str(reply)),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0 or not reply.is_file():
            ended = _reason(done.stderr)
            if done.returncode < 0:
                [asserted, *_] = [*_ASSERTED.findall(done.stderr), ""]
                ended = f"signal {-done.returncode}{asserted and f', {asserted}'}"
            raise UserError(f"llama.cpp does not load the file: {ended}.")
        values = json.loads(reply.read_text(encoding="utf-8"))
    values["log_probabilities"] = [
        {int(token): value for token, value in row.items()} for row in values["log_probabilities"]
    ]
    return Said(**values)


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and "Traceback" not in line]
    said = (errors or lines[-1:] or ["it was killed"])[0].rstrip(".")
    return _LOG_HEAD.sub("", said)


# What runs in the separate process


class _Server:
    """llama.cpp's server for one file, on the CPU, in fp32 where possible."""

    def __init__(self, file: str, *, num_tokens: int, adapter: str | None, chat_template: str | None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx = num_tokens
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.swa_full = True
        params.use_jinja = True
        params.port = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.fit_params = False
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
        if chat_template is not None:
            params.chat_template = chat_template
        self._server = xllamacpp.Server(params)
        self._letter = self.tokens("a")[-1]

    def post(self, path: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer.  Raises ValueError with the server's message if it rejects the request."""
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            # the address is that of the server in this process
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # nosec B310
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(_error_of(error.read())) from None
        return answer

    def tokens(self, text: str) -> list[int]:
        return list(self.post("/tokenize", {"content": text, "add_special": True})["tokens"])

    def likeliest(self, row: Sequence[int], number: int) -> dict[int, float]:
        # Probabilities are those of the logits, whatever comes next; an end or half a letter has none.
        answer = self.post(
            "/completion",
            {
                "prompt": list(row),
                "n_predict": 1,
                "n_probs": number,
                "temperature": 0,
                "cache_prompt": True,
                "logit_bias": [[self._letter, _CERTAIN]],
            },
        )
        found = answer["completion_probabilities"][0]["top_logprobs"]
        return {item["id"]: item["logprob"] for item in found}

    def ends_with(self, row: Sequence[int], token: int) -> bool:
        answer = self.post(
            "/completion",
            {"prompt": list(row), "n_predict": 4, "temperature": 0, "logit_bias": [[token, _CERTAIN]]},
        )
        return answer.get("stop_type") == "eos"


def _error_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]


def main(file: str, request: str, reply: str) -> None:
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    longest = max((len(row) for row in asked["rows"]), default=0)
    server = _Server(
        file,
        num_tokens=max(256, longest + 16),
        adapter=asked["adapter"],
        chat_template=asked["chat_template"],
    )
    likeliest: list[dict[int, float]] = []
    row_refusals: list[str] = []
    for row in asked["rows"]:
        try:
            found, refusal = server.likeliest(row, asked["num_likeliest"]), ""
        except ValueError as error:
            found, refusal = {}, str(error)
        likeliest.append(found)
        row_refusals.append(refusal)
    rendered: list[str | None] = []
    rendered_tokens, refusals = [], []
    for conversation in asked["conversations"]:
        try:
            text = server.post("/apply-template", conversation)["prompt"]
        except ValueError as error:
            text = None
            refusals.append(str(error))
        else:
            refusals.append("")
        rendered.append(text)
        rendered_tokens.append([] if text is None else server.tokens(text))
    said = {
        "tokens": [server.tokens(text) for text in asked["texts"]],
        "log_probabilities": likeliest,
        "row_refusals": row_refusals,
        "ends": [server.ends_with((asked["rows"] or [[1, 2, 3]])[0], token) for token in asked["ends"]],
        "rendered": rendered,
        "rendered_tokens": rendered_tokens,
        "refusals": refusals,
    }
    Path(reply).write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
