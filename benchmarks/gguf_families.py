"""Which families llama.cpp runs as transformers does, after its converter: the table of docs/models.md.

    python benchmarks/gguf_families.py --json FILE [--family NAME]
    python benchmarks/gguf_families.py --json FILE --table

The first form appends a line for each family that FILE does not have yet; the second prints the table.  Tiny
models with random weights, as `autosft export --format gguf` tries a family, each with the tokenizers below
until one comes out right.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from families import FAMILIES, Family

sys.path.insert(0, str(Path(__file__).parents[1]))

from autosft.workers.tools.export_gguf import try_family
from tests.workers.tools.test_gguf_files import QWEN2
from tests.workers.tools.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

VOCAB_SIZE = 400
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "byte-level, Qwen's words": lambda folder: byte_level_tokenizer(folder, pattern=QWEN2),
    "sentencepiece": sentencepiece_tokenizer,
    "sentencepiece, Gemma's": lambda folder: sentencepiece_tokenizer(folder, puts_blank_first=False),
    "byte-level, GLM's tokens": lambda folder: byte_level_tokenizer(folder, special=GLM),
}
#: What llama.cpp knows of real models by heart, in place of what the tiny ones of the table of memory have.
_GEMMA = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
AS_REAL: dict[str, dict[str, Any]] = {
    "Gemma 3": {**_GEMMA, "query_pre_attn_scalar": 16},
    "Gemma 3 with vision": {**_GEMMA, "query_pre_attn_scalar": 16},
    "Gemma 4": _GEMMA,
    "Llama 4": {"attention_chunk_size": 8192},
    "Qwen 3.5": {"head_dim": 256},
}
#: Families whose converters want another than the first, by a part of the name.
HINTS = {
    "Qwen": "byte-level, Qwen's words",
    "Gemma": "sentencepiece, Gemma's",
    "GLM": "byte-level, GLM's tokens",
    "Phi 3": "sentencepiece",
    "Phi 4": "sentencepiece",
    "MiniCPM": "sentencepiece",
    "Jamba": "sentencepiece",
    "Zamba": "sentencepiece",
    "Mixtral": "sentencepiece",
}


def config_json(family: Family) -> str:
    """Return a family's configuration with room for the tokenizers."""

    def wider(values: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in values if name.startswith("vocab_size")]
        return {**values, **dict.fromkeys(names, VOCAB_SIZE)}

    values = wider(family.config)
    if "text_config" in values:
        values["text_config"] = wider(values["text_config"])
    values.get("text_config", values).update(AS_REAL.get(family.name, {}))
    return json.dumps(values)


def measure(family: Family) -> dict[str, Any]:
    """Return a row: how a small model came out, with the first tokenizer that is right or the best one."""
    started = time.perf_counter()
    tried: list[dict[str, Any]] = []
    hint = next((hint for word, hint in HINTS.items() if word in family.name), "byte-level")
    for name, make in sorted(TOKENIZERS.items(), key=lambda item: item[0] != hint):
        said = "" if not tried else str(tried[0]["refused"] or tried[0]["differences"])
        if tried and not any(word in said for word in ("token ids", "tokenizer", "vocab")):
            break  # another tokenizer would not mend it
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = make(Path(folder))
            try:
                found = try_family(config_json(family), tokenizer, base=folder)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
        if isinstance(found, str):
            tried.append({"tokenizer": name, "refused": found, "differences": []})
            continue
        tried.append({"tokenizer": name, "refused": None, "differences": list(found.differences)})
        if not found.differences:
            break
    best = min(tried, key=lambda row: (row["refused"] is not None, len(row["differences"])))
    return {"family": family.name, **best, "seconds": round(time.perf_counter() - started, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/models.md."""
    by_name = {row["family"]: row for row in rows}
    lines = ["| family | GGUF | tokenizer | what |", "|---|---|---|---|"]
    for family in FAMILIES:
        row = by_name.get(family.name)
        if row is None:
            continue
        how, what = "yes", ""
        if row["refused"]:
            how, what = "does not convert", row["refused"]
        elif row["differences"]:
            how, what = "differs", "; ".join(row["differences"])
        lines.append(f"| {family.name} | {how} | {row['tokenizer']} | {what.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--family", action="append")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(read_rows(given.json)))
        return
    known = {row["family"] for row in read_rows(given.json)}
    for family in FAMILIES:
        if family.name in known or (given.family and family.name not in given.family):
            continue
        row = measure(family)
        with given.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
