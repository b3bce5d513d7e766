"""Convert a model's folder to a GGUF file and compare the two, in a separate process.

`python -m autosft.workers.tools.export_gguf FOLDER FILE DTYPE [--base BASE] [--trust-remote-code]` writes the
GGUF file and a Modelfile next to it; `... FOLDER --family` only checks whether models of that configuration
convert correctly.  Prints a line for each note on the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs
import transformers
from transformers import AutoConfig, GenerationConfig

from autosft.profiles.dataset.tokenizer import load_tokenizer
from autosft.profiles.dataset.turn_end import turn_end
from autosft.profiles.errors import UserError
from autosft.workers.load_weights import load_base
from autosft.workers.tools import gguf_engine
from autosft.workers.tools.gguf_compare import Comparison, compare, rows_of
from autosft.workers.tools.gguf_conversion import with_old_names
from autosft.workers.tools.gguf_converter import VERSION, convert
from autosft.workers.tools.modelfile import modelfile
from autosft.workers.tools.scratch import scratch_folder, stopped_by_signals
from autosft.workers.tools.shared_files import copy_tokenizer_model, find_tokenizer_model, share_as_folder
from autosft.workers.tools.tiny_twin import tiny_twin

NOT_COMPARED = (
    "Converted but not compared: llama.cpp itself is not installed here (pip install 'autosft[gguf]'). "
    "Converters are silently wrong for some models."
)
OTHERWISE = (
    "Nothing was written.  --format vllm writes the model for vLLM, --format hub --merge for transformers."
)
#: The fields of an added token in tokenizer_config.json besides its text.
_OF_TOKEN = ("special", "lstrip", "rstrip", "normalized", "single_word")
#: A change here repeats the check of every family.
_TRIED = f"3-{VERSION}"


def export_gguf(
    folder: str, file: Path, *, dtype: str, base: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """Convert a folder of a whole model with its tokenizer; return notes on the file.

    `base` may have a `tokenizer.model` that transformers did not save.  Raises UserError if the family or
    this file differs from the model in transformers, and leaves no file.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    require_family(folder, base=base, trust_remote_code=trust_remote_code)
    with scratch_folder(file.parent, ".converting-") as scratch:
        unfinished = scratch / "model.gguf"
        source = prepared(Path(folder), scratch / "folder", tokenizer, base=base)
        convert(source, unfinished, dtype=dtype)
        if not gguf_engine.is_here():
            return [NOT_COMPARED, *_hand_over(unfinished, file, folder, tokenizer)]
        model = load_base(folder, dtype="float32", trust_remote_code=trust_remote_code)
        model.eval()
        vocab_size = model.get_output_embeddings().weight.shape[0]
        rows = rows_of(model.config, vocab_size)
        found = compare(model, tokenizer, unfinished, dtype=dtype, rows=rows)
        require_alike(found, "the GGUF file is not the model that was trained")
        return [said_of(found, dtype), *found.notes, *_hand_over(unfinished, file, folder, tokenizer)]


def _hand_over(unfinished: Path, file: Path, folder: str, tokenizer: Any) -> list[str]:
    """Move the file into place, with a Modelfile next to it; return notes on that."""
    generation = Path(folder) / "generation_config.json"
    answers = GenerationConfig.from_pretrained(folder) if generation.is_file() else None
    text, notes = modelfile(tokenizer, answers, file.name)
    (file.parent / "Modelfile").write_text(text, encoding="utf-8")
    unfinished.rename(file)
    share_as_folder(file.parent)
    return notes


def require_family(source: str, *, base: str | None, trust_remote_code: bool = False) -> None:
    """Raise UserError if models of this configuration and tokenizer differ in llama.cpp.

    Checked once with a small model of random weights; the result is cached.
    """
    found = family(source, base=base, trust_remote_code=trust_remote_code)
    if isinstance(found, str):
        raise UserError(found)
    require_alike(found, "a model of this family is another one in llama.cpp (tried with a small one)")


def family(source: str, *, base: str | None, trust_remote_code: bool = False) -> Comparison | str:
    """Return the comparison of a small model of a configuration; the error's text if it does not convert.

    `source` is a folder or a hub id.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config_json = _config_json(source, trust_remote_code=trust_remote_code)
    beside = find_tokenizer_model(base or source)
    mark = _mark(config_json, tokenizer, beside)
    cached = Path(platformdirs.user_cache_dir("autosft")) / "gguf-families" / f"{mark}.json"
    if cached.is_file():
        values: Any = json.loads(cached.read_text(encoding="utf-8"))
        if isinstance(values, str):
            return values
        for name in ("differences", "notes"):
            values[name] = tuple(values[name])
        return Comparison(**values)
    found = try_family(config_json, tokenizer, base=base or source, trust_remote_code=trust_remote_code)
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(found if isinstance(found, str) else asdict(found)), encoding="utf-8")
    return found


def try_family(
    config_json: str, tokenizer: Any, *, base: str, trust_remote_code: bool = False
) -> Comparison | str:
    """Convert a small model of random weights, and compare it if the engine is installed."""
    model = tiny_twin(config_json, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="autosft-family-") as scratch:
        folder, file = Path(scratch) / "saved", Path(scratch) / "model.gguf"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            convert(prepared(folder, Path(scratch) / "folder", tokenizer, base=base), file, dtype="f32")
            if not gguf_engine.is_here():
                return Comparison(differences=())
            rows = rows_of(model.config, len(tokenizer))
            return compare(model, tokenizer, file, dtype="f32", rows=rows)
        except UserError as error:
            return error.message


def _config_json(source: str, *, trust_remote_code: bool) -> str:
    file = Path(source) / "config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    return str(config.to_json_string(use_diff=False))


def prepared(folder: Path, copy: Path, tokenizer: Any, *, base: str | None) -> Path:
    """Return a folder for the converter: links to `folder`'s files, and those that it needs changed.

    The tokenizer's end of sequence becomes the end of turn, since a GGUF file has only one; `tokenizer.model`
    is the base's, if it has one, with the tokens that were added since.
    """
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            (copy / path.name).symlink_to(path.resolve())
    settings = copy / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    ends = turn_end(tokenizer).token_ids
    if ends:
        values["eos_token"] = tokenizer.convert_ids_to_tokens(ends[0])
    values.update(_added_around(tokenizer))
    copy_tokenizer_model(copy, base)
    if (copy / "tokenizer.model").exists():
        values["added_tokens_decoder"] = {
            str(number): {"content": str(token), **{name: getattr(token, name) for name in _OF_TOKEN}}
            for number, token in tokenizer.added_tokens_decoder.items()
        }
    settings.unlink(missing_ok=True)
    settings.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    config = copy / "config.json"
    # Some of the converter's classes read the file themselves.
    fields = with_old_names(json.loads(config.read_text(encoding="utf-8")))
    if ends:
        fields["eos_token_id"] = ends[0]
    config.unlink()
    config.write_text(json.dumps(fields), encoding="utf-8")
    return copy


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Return whether the tokenizer adds its first and last token to texts; else the converter guesses."""
    ids = tokenizer("a")["input_ids"]
    return {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id],
    }


def require_alike(found: Comparison, what: str, *, remedy: str = OTHERWISE) -> None:
    """Raise UserError that names what differs."""
    if found.differences:
        raise UserError(
            f"{what}: {'; '.join(found.differences)}.",
            remedy=remedy,
        )


def said_of(found: Comparison, dtype: str) -> str:
    return (
        f"Compared with transformers: {found.num_texts} texts have the same token ids, the next token "
        f"after {found.num_rows} prompts has the same probabilities ({dtype}, apart by at most "
        f"{found.apart:.1e} of the logits' spread), turns end at the same token, conversations are rendered "
        "the same."
    )


def _mark(config_json: str, tokenizer: Any, beside: Path | None) -> str:
    """Return a name for everything that the result depends on."""
    words = sorted(tokenizer.get_vocab().items())
    known = (_TRIED, transformers.__version__, gguf_engine.is_here(), config_json, tokenizer.chat_template)
    told = (words, tokenizer.special_tokens_map, [str(token) for token in tokenizer.added_tokens_decoder])
    digest = hashlib.sha256(repr((known, told)).encode())
    digest.update(b"" if beside is None else beside.read_bytes())
    return digest.hexdigest()[:40]


def _run(given: argparse.Namespace) -> list[str]:
    if given.family:
        require_family(given.folder, base=given.base, trust_remote_code=given.trust_remote_code)
        return [] if gguf_engine.is_here() else [NOT_COMPARED]
    return export_gguf(
        given.folder,
        given.file,
        dtype=given.dtype,
        base=given.base,
        trust_remote_code=given.trust_remote_code,
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("dtype", nargs="?")
    parser.add_argument("--base")
    parser.add_argument("--family", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args(arguments)
    try:
        with stopped_by_signals():
            notes = _run(given)
    except UserError as error:
        # To the command that started it, which reads the last two lines.
        print(f"{error.message}\n{error.remedy or OTHERWISE}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    print("\n".join(notes))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
