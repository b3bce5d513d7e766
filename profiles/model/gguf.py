"""Use a GGUF file as a model: convert it once into a plain folder of its dequantized weights.

`python -m autosft.profiles.model.gguf FILE FOLDER [--without-weights]` converts a file, in a separate
process: the weights are held in memory as fp32.

transformers reads GGUF (`gguf_file=`), but cannot save what it has read, and drops tensors without a known
name. Here a file is refused unless every tensor is in the model and the vocabulary equals the file's own.
Folders are cached by the file's content; the same file gives the same folder on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.model.adapter_folder import TOKENIZER_FILES, base_of, is_adapter_folder
from autosft.profiles.model.content_mark import content_mark
from autosft.profiles.model.weight_keys import quiet_loading, require_whole
from autosft.profiles.own_folders import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
#: Weights are stored as fp32, the result of dequantizing; with more parameters than this as bf16.
FP32_PARAMETERS = 3_000_000_000
#: A change here converts folders of older versions again.
_VERSION = 1

#: `tokenizer.ggml.pre` values that split words as GPT-2 does, with separate digits (as in llama.cpp).
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
#: Values missing in transformers' own table that split words as GPT-2 does.
_AS_GPT2 = ("default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "roberta-bpe")

SAMPLES = (
    "The quick brown fox doesn't jump over 12,345 lazy dogs.",
    "def f(x):\n\treturn  x**2  # comment\n\n\n",
    "Größe, naïve café, 东京 2024年, привет, مرحبا, 🙂🚀",
    "<a href='x'>I'LL  be\r\nthere</a>   ",
)


def is_gguf(source: str) -> bool:
    """Return whether `--model` is a GGUF file, by its first bytes, whatever its name."""
    path = Path(source).expanduser()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def plain_folder(source: str, *, need_weights: bool = True) -> str:
    """Return a folder that `from_pretrained` loads: the conversion of a GGUF file, else `source`.

    Converts a new file, which may take minutes and writes the dequantized weights into the cache; without
    `need_weights` only its configuration and tokenizer.  Raises UserError for a file that cannot be trained
    on.
    """
    if not is_gguf(source):
        return source
    from filelock import FileLock

    path = Path(source).expanduser().resolve()
    root = cache_folder() / "gguf"
    name = f"{content_mark(path)[:40]}-v{_VERSION}"
    whole, outline = root / name, root / f"{name}-outline"
    if whole.is_dir():
        return str(whole)
    if outline.is_dir() and not need_weights:
        return str(outline)
    folder = whole if need_weights else outline
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():
            _make(path, folder, need_weights=need_weights)
    return str(folder)


def tokenizer_home(source: str) -> str:
    """Return a model's tokenizer folder: a GGUF file's conversion, an adapter's folder or its base's."""
    folder = Path(source).expanduser()
    if is_adapter_folder(source) and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return plain_folder(base_of(source) or source, need_weights=False)
    return plain_folder(source, need_weights=False)


def description(source: str) -> str:
    """Describe a GGUF file: "GGUF, Q4_1 and Q8_0"."""
    from gguf import GGUFReader

    types = {tensor.tensor_type.name for tensor in GGUFReader(str(Path(source).expanduser())).tensors}
    names = sorted(types - {"F32", "F16", "BF16"})
    return f"GGUF, {' and '.join(names)}" if names else "GGUF"


def converted_dtype(folder: Path) -> str:
    """Return the dtype of a GGUF file's converted weights, existing or not."""
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"])


def _make(path: Path, folder: Path, *, need_weights: bool) -> None:
    """Convert, and move the folder into place when it is complete."""
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        convert_apart(path, unfinished, need_weights=need_weights)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def convert_apart(path: Path, folder: Path, *, need_weights: bool) -> None:
    """Convert in another process.  Raises UserError."""
    done = subprocess.run(
        [
            *python("-m", "autosft.profiles.model.gguf", str(path), str(folder)),
            *([] if need_weights else ["--without-weights"]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        told = done.stderr.strip().splitlines() or ["it was killed, perhaps for lack of memory"]
        raise unreadable(path, told[-1])


def unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"--model {path} cannot be read as a GGUF model: {reason}",
        remedy="Give the folder of the original model, as save_pretrained wrote it.",
    )


def convert(path: Path, folder: Path, *, need_weights: bool) -> None:
    """Write configuration, tokenizer and, with `need_weights`, dequantized weights into a folder.

    Raises UserError if any part of the file would be lost.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    metadata, tensors = read_metadata(path)
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    config.name_or_path = ""
    _require_rope(config, metadata, tensors, path)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(parameter.numel() for parameter in outline.parameters())
    dtype = torch.float32 if num_parameters <= FP32_PARAMETERS else torch.bfloat16
    tokenizer = load_tokenizer(path, metadata)
    config.architectures = [type(outline).__name__]
    config.dtype = dtype
    if need_weights:
        with quiet_loading():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                config=config,
                dtype=dtype,
                output_loading_info=True,
            )
        require_whole(report, path.name, config)
        _require_all_used(model, config, tensors)
        _save(model, folder)
    else:
        config.save_pretrained(folder)
        outline.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_metadata(path: Path) -> tuple[Mapping[str, Any], dict[str, tuple[int, ...]]]:
    """Return a file's metadata, with its vocabulary, and the shapes of its tensors by name."""
    from gguf import GGUFReader  # transformers' own reader knows fewer types of blocks
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(path), ("tokenizer.ggml.tokens",))
    tensors = GGUFReader(str(path)).tensors
    return metadata, {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors}


def load_tokenizer(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a file, with exactly the file's tokens.

    Raises UserError if the vocabulary differs, and for unknown pre-tokenizers.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        if split in _DIGITS_APART:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif split is not None and split not in _AS_GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
            raise UserError(
                f"{path.name}: how its tokenizer splits words ({split!r}) is not known here: text would "
                "become other tokens than the model was trained on."
            )
    tokens = metadata["tokenizer.ggml.tokens"]
    if len(tokenizer) > len(tokens):
        tokenizer = _without_added(tokenizer, len(tokens))
    require_same_tokens(tokenizer, tokens, path.name)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and tokenizer.chat_template != template:
        tokenizer.chat_template = template
    return tokenizer


def _without_added(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer without the tokens that transformers has added to the file's.

    Its GPT-2 class adds "<|endoftext|>", which would come after the last embedding.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [item for item in state["added_tokens"] if item["id"] < num_tokens]
    kept = Tokenizer.from_str(json.dumps(state))
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and kept.token_to_id(token) is not None
    }
    made = PreTrainedTokenizerFast(tokenizer_object=kept, **special)
    made.chat_template = tokenizer.chat_template
    return made


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str], name: str) -> None:
    """Raise UserError if a tokenizer's ids do not have the texts that the GGUF file gives them.

    Compares the text of every id, and checks that sample texts survive encoding and decoding.
    """
    known = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    if len(tokenizer) > len(tokens):
        raise UserError(
            f"{name}: its tokenizer came out with {len(tokenizer):,} tokens, the file has {len(tokens):,}."
        )
    differing = [i for i, token in enumerate(tokens) if not _is_same_token(known[i], token)]
    if differing:
        first = differing[0]
        raise UserError(
            f"{name}: {len(differing):,} tokens came out different from the file's, the first is {first}: "
            f"{known[first]!r} for {tokens[first]!r}."
        )
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.strip() != text.strip():
            raise UserError(f"{name}: its tokenizer makes {back!r} of {text!r}.")


def _is_same_token(known: str | None, token: str) -> bool:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if known == token:
        return True
    if known is None:
        return False
    spelled = bytes_to_unicode()  # a token in plain text is spelled in the alphabet of bytes, spaces as ▁
    return known in ("".join(spelled[byte] for byte in token.encode()), token.replace(" ", "▁"))


def _require_rope(
    config: Any, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Raise UserError for scaled rotary positions, which transformers does not read from GGUF files."""
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type")
    has_factors = any(name.startswith("rope_") for name in tensors)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if (has_factors or kind not in (None, "none")) and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"{path.name} scales its rotary positions ({kind or 'by factors'}), which is lost where "
            "transformers reads GGUF."
        )


def _require_all_used(model: PreTrainedModel, config: Any, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if a file has more numbers than the converted model."""
    stored = sum(_count(shape) for name, shape in tensors.items() if not name.startswith("rope_"))
    counted = sum(parameter.numel() for parameter in model.parameters())
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    head = _count(tensors["output.weight"]) if is_tied and "output.weight" in tensors else 0
    if stored - head != counted:
        raise UserError(f"the file holds {stored:,} weights, the model that came of it {counted:,}.")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model from GGUF as a plain one, which transformers itself refuses."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model._weight_conversions = None
    model.save_pretrained(folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without-weights", action="store_true")
    given = parser.parse_args()
    try:
        convert(given.file, given.folder, need_weights=not given.without_weights)
    except UserError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - to the process that started this one
        sys.exit(2)
