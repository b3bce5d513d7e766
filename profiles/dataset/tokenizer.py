"""Load tokenizers: the only way to, for preparing data, training, scoring, answering and exporting.

transformers chooses a class by the model's type, and some classes rebuild word splitting and normalization
in their own code, using only vocabulary and merges of the folder's tokenizer.json (Qwen2Tokenizer,
LlamaTokenizer, ...).  If that gives other tokens than the file, the file is used: the model was trained with
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.hub import hub_answers
from autosft.profiles.errors import UserError
from autosft.profiles.model.gguf import tokenizer_home

Say = Callable[[str], object]


def say_nothing(_sentence: str) -> None:
    """Ignore a remark, where it has been reported before or nobody reads it."""


_PROCESSORS_TEMPLATE = "chat_template.json"
#: How many tokens of the vocabulary, evenly spread, are compared in addition to the sample texts.
_NUM_COMPARED = 4096

#: Letters of several scripts, composed and not, digits, contractions, spaces, lines, code, an emoji.
SAMPLE = (
    "It's 2026-11-30, isn't it? THEY'LL've said: 3.14159 + 1,000,000 = ???",
    "  two  spaces\tand a tab\r\n\n\n   then lines   \n",
    "Größe, naïve café, cafe\u0301, \ufb01ne, \u212b, \uff21\uff22\uff23\uff11\uff12",
    "Привет, мир! 你好,世界。こんにちは 안녕하세요 مرحبا हिन्दी ไทย",
    "def f(x_1: int) -> str:\n    return f'{x_1:>8}'  # <tag/> & \"quotes\" — 👩‍🔬",
    " leading", "trailing ", "UPPER lower MiXed", "aaaaaaaaaaaaaaaa", "00000000",
)  # fmt: skip


def load_tokenizer(
    source: str,
    *,
    trust_remote_code: bool = False,
    padding_side: str | None = None,
    num_embeddings: int | None = None,
    is_checked: bool = False,
    say: Say = say_nothing,
) -> Any:
    """Load the tokenizer of a model folder or hub id, with a pad token.

    num_embeddings   rows of the model's embedding, None if not known yet: see `fit_pad`
    is_checked       whether the folder was written from a tokenizer that this function returned
    say              receives a sentence for each deviation from transformers or the folder

    Raises UserError if no tokenizer can be loaded, and if no token can pad.
    """
    folder = Path(tokenizer_home(source)).expanduser()
    options = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": folder.is_dir() or not hub_answers(),
        **({} if padding_side is None else {"padding_side": padding_side}),
    }
    name = str(folder) if folder.is_dir() else source
    tokenizer = _loaded(source, name, options)
    if not is_checked:
        tokenizer = _as_the_file_says(tokenizer, source, name, options, say)
        if not tokenizer.chat_template and (template := _template_of_processor(name, options)):
            tokenizer.chat_template = template
            say(f"the chat template of {source} is that of its processor, in {_PROCESSORS_TEMPLATE}")
    fit_pad(tokenizer, num_embeddings, name=source, say=say)
    return tokenizer


def fit_pad(
    tokenizer: Any, num_embeddings: int | None, *, name: str = "the model", say: Say = say_nothing
) -> None:
    """Give a tokenizer a pad token whose id has an embedding: its own, else the end-of-sequence token.

    A pad token that was added without resizing the embedding ends training with an index error.  Padding is
    masked and never scored, so that any token will do.  Raises UserError if there is none.
    """
    limit = float("inf") if num_embeddings is None else num_embeddings
    pad, pad_id = tokenizer.pad_token, tokenizer.pad_token_id
    if pad is not None and pad_id < limit:
        return
    for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) < limit:
            tokenizer.pad_token = token
            if pad is not None:
                say(
                    f"the pad token {pad} of {name} has the id {pad_id:,}, and the model has {limit:,} "
                    f"embeddings (0 to {limit - 1:,}): {token} pads instead"
                )
            return
    if pad is None and num_embeddings is None:
        return  # generating single sequences needs none
    raise UserError(
        f"the pad token {pad} of {name} has the id {pad_id}, and the model has {limit} embeddings; no "
        "end-of-sequence, unknown or beginning token could pad instead."
        if pad is not None
        else f"the tokenizer of {name} has no token that could pad.",
        remedy="Set pad_token in its tokenizer_config.json to a token that the model knows.",
    )


def _loaded(source: str, name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if (pointer := _lfs_pointer(name)) is not None:
        raise UserError(
            f"no tokenizer can be loaded from {source}: {pointer} is a pointer of git lfs, not the file.",
            remedy="Fetch it: git lfs pull",
        )
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # transformers, tokenizers and the hub's client raise their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (
            " ".join(lines[:3]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
        )
        needs_code = "trust_remote_code" in str(error)
        raise UserError(
            f"no tokenizer can be loaded from {source}: "
            + ("it contains code that has to be run." if needs_code else reason),
            remedy="Review that code, then pass --trust-remote-code." if needs_code else None,
        ) from error


def _lfs_pointer(name: str) -> str | None:
    """Return the file of a tokenizer in a folder that git lfs has not fetched; None without one."""
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        try:
            with (Path(name) / file).open("rb") as stream:
                if stream.read(40).startswith(b"version https://git-lfs"):
                    return file
        except OSError:
            continue
    return None


def _as_the_file_says(tokenizer: Any, source: str, name: str, options: dict[str, Any], say: Say) -> Any:
    """Return the tokenizer, or one loaded directly from tokenizer.json if that gives other tokens."""
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer  # wraps the file itself
    if not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer  # the folder's own code, which the user has asked for
    path = _tokenizer_file(name)
    if path is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer
    from tokenizers import Tokenizer

    of_file = Tokenizer.from_file(str(path))
    if (found := difference(tokenizer.backend_tokenizer, of_file)) is None:
        return tokenizer
    try:
        plain = PreTrainedTokenizerFast.from_pretrained(name, **options)
    except Exception as error:
        raise UserError(f"tokenizer.json of {source} cannot be loaded as it stands: {error}") from error
    if difference(plain.backend_tokenizer, tokenizer.backend_tokenizer) is None:
        return tokenizer  # tokenizer_config.json overrides the file for any class
    say(
        f"transformers' {type(tokenizer).__name__}, chosen by the model's type, splits text otherwise than "
        f"{source}'s own tokenizer.json ({found!r}, for one): the file is used.  Other programs may need "
        "PreTrainedTokenizerFast in place of AutoTokenizer"
    )
    return plain


def _template_of_processor(name: str, options: dict[str, Any]) -> str | None:
    """Return the chat template that vision-language checkpoints have in a file of their own; None without.

    transformers 5.23 reads it for their processors alone, not for their tokenizers.
    """
    from transformers.utils import cached_file

    path = cached_file(
        name,
        _PROCESSORS_TEMPLATE,
        local_files_only=options["local_files_only"],
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    template = told.get("chat_template") if isinstance(told, dict) else None
    return template if isinstance(template, str) else None


def difference(one: Any, other: Any) -> str | None:
    """Return a text that two `tokenizers.Tokenizer` tokenize differently, None if none is found."""
    texts = [*SAMPLE, *_token_texts(other)]
    ours, theirs = _encoded(one, texts), _encoded(other, texts)
    if ours is None or theirs is None:
        return None if ours is theirs else texts[0]
    return next((text for text, *ids in zip(texts, ours, theirs, strict=True) if ids[0] != ids[1]), None)


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]] | None:
    """Return the ids of texts; None if they cannot be encoded, for example without an unknown token."""
    try:
        return [item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)]
    except Exception:  # tokenizers raises nothing narrower
        return None


def _token_texts(tokenizer: Any) -> Sequence[str]:
    """Return the texts of tokens spread over the vocabulary: other splitting rules would cut some of them."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    ids = range(0, size, max(1, size // _NUM_COMPARED))
    return [text for text in tokenizer.decode_batch([[id_] for id_ in ids]) if "\ufffd" not in text]


def _tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json of a folder, or of a hub id that has just been loaded."""
    if (folder := Path(name)).is_dir():
        path = folder / "tokenizer.json"
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None


def num_embeddings_of(folder: Path) -> int | None:
    """Return the size of the vocabulary in a folder's config.json, None if it is missing."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = values.get("text_config") if isinstance(values, dict) else None
    size = (text or values).get("vocab_size") if isinstance(values, dict) else None
    return size if isinstance(size, int) else None
