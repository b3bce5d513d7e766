"""Locate a model and list its files: a folder, a repository of the hub, or a row of the shipped table."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.json_files import read_json_object
from autosft.profiles.model.adapter_folder import (
    TOKENIZER_FILES,
    WEIGHT_FILES,
    base_of,
    is_adapter_folder,
    settings_of,
)
from autosft.profiles.model.content_mark import content_mark
from autosft.profiles.model.gguf import is_gguf, plain_folder
from autosft.profiles.model.near_models import what_to_give
from autosft.profiles.model.weight_keys import read_header
from autosft.profiles.recipe import AdapterSettings
from autosft.profiles.sources import trained_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Where a model was found, and its files."""

    source: str
    revision: str | None
    config: dict[str, Any] | None  # None: transformers reads it from `pretrained`
    pretrained: str
    names: frozenset[str]  # of the files
    weights: tuple[tuple[str, str], ...]  # name and fingerprint of the content, sorted by name
    stored_dtype: str | None
    has_chat_template: bool
    is_shape: bool = False
    adapter: AdapterSettings | None = None  # of an adapter's folder; the other fields are its base model's
    adapter_weights: tuple[tuple[str, str], ...] = ()
    is_converted: bool = False  # from a GGUF file, which `weights` then describes
    note: str | None = None


def locate(source: str, *, for_training: bool, need_weights: bool = True) -> Located:
    """Find a model by folder, hub id or name in the table, as `profile.load_model_profile` documents.

    With `for_training`, its tokenizer and (`need_weights`) its weights must exist, and a name without an
    owner ("gpt2") is looked up on the hub first; otherwise the table is used first.
    """
    folder = Path(source).expanduser()
    require_plausible(source)
    if is_adapter_folder(source):
        located = _locate_adapter(source, folder, for_training=for_training, need_weights=need_weights)
    elif folder.is_dir():
        located = _locate_folder(source, folder)
    elif folder.exists():
        located = _locate_gguf(source, folder, need_weights=for_training and need_weights)
    elif not for_training and "/" not in source and (shape := _known_shape(source)) is not None:
        located = _locate_shape(source, shape, note=None)
    else:
        located = _locate_on_hub(source)
    if for_training:
        _require_tokenizer(located)
        if need_weights:
            _require_weights(located)
    return located


def require_plausible(source: str) -> None:
    """Raise UserError for what cannot be a model by its path and first bytes; asks and loads nothing."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not is_adapter_folder(source) and not (path / "config.json").is_file():
            inner = trained_in(source)
            of_run = f"It is the folder of a run: give {inner}"
            remedy = what_to_give(path) if inner == source else of_run
            raise UserError(f"--model {source} has no config.json.", remedy=remedy)
    elif path.exists():
        if not is_gguf(source):
            raise UserError(
                f"--model {source} is a file, and not a GGUF file.",
                remedy="Give the folder that holds config.json, or a GGUF file.",
            )
    elif not _HUB_ID.fullmatch(source):
        raise UserError(f"--model {source}: there is no such folder.", remedy="Check the path.")


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
#: What transformers reads, in this order; of weights in several files there is NAME.index.json.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_FOREIGN_SUFFIXES = (
    ".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".ckpt", ".ot",
)  # fmt: skip
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def _locate_folder(
    source: str, folder: Path, *, revision: str | None = None, note: str | None = None
) -> Located:
    names = frozenset(path.name for path in folder.iterdir() if path.is_file())
    weights = tuple((path.name, content_mark(path)) for path in weight_files(folder))
    return Located(
        source=source,
        revision=revision,
        config=None,
        pretrained=str(folder),
        names=names,
        weights=weights,
        stored_dtype=_stored_dtype(folder / name for name, _ in weights if name.endswith(".safetensors")),
        has_chat_template=_has_chat_template(folder, names),
        note=note,
    )


def _locate_adapter(source: str, folder: Path, *, for_training: bool, need_weights: bool) -> Located:
    """Return the base model of an adapter's folder, with the adapter to continue from."""
    base = base_of(source)
    assert base is not None
    settings = settings_of(folder)
    located = locate(base, for_training=for_training, need_weights=need_weights)
    names = frozenset(path.name for path in folder.iterdir())
    own_template = bool(names & set(TOKENIZER_FILES)) and _has_chat_template(folder, names)
    note = f"{source} is an adapter (rank {settings.rank}) on {base}: training goes on from its weights."
    return replace(
        located,
        source=source,
        adapter=settings,
        adapter_weights=tuple(
            (name, content_mark(folder / name)) for name in sorted(names & set(WEIGHT_FILES))
        ),
        has_chat_template=located.has_chat_template or own_template,
        note=" ".join(filter(None, (note, located.note))),
    )


def _locate_gguf(source: str, path: Path, *, need_weights: bool) -> Located:
    """Return the conversion of a GGUF file, with the file's own name and content."""
    from autosft.profiles.model import gguf

    converted = Path(gguf.plain_folder(source, need_weights=need_weights))
    what = gguf.description(source)
    return replace(
        _locate_folder(source, converted),
        weights=((path.name, content_mark(path)),),
        stored_dtype=gguf.converted_dtype(converted),
        is_converted=True,
        note=f"{path.name} ({what}) is trained on its dequantized weights, which are kept in {converted}.",
    )


def _locate_shape(source: str, shape: dict[str, Any], *, note: str | None) -> Located:
    return Located(
        source=source,
        revision=None,
        config=shape["config"],
        pretrained=source,
        names=frozenset(),
        weights=(),
        stored_dtype=shape["config"]["dtype"],
        has_chat_template=False,
        is_shape=True,
        note=note,
    )


def _locate_on_hub(source: str) -> Located:
    """Query the hub; if it cannot be reached, use its cache and then the shipped table."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        info = HfApi().model_info(source, timeout=10, files_metadata=True)
    except errors.GatedRepoError:
        raise UserError(
            f"--model {source} is gated on the hub.",
            remedy=f"Ask for access at https://huggingface.co/{source} and log in with: hf auth login",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"--model {source}: neither a folder here nor a repository on the hub.",
            remedy=f"Check the name; for a private one log in first (hf auth login). {_known_names(source)}",
        ) from None
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # its HTTP client's
        cached = try_to_load_from_cache(source, "config.json")
        if isinstance(cached, str):
            folder = Path(cached).parent
            return _locate_folder(
                source,
                folder,
                revision=folder.name,
                note=f"The hub cannot be reached: {source} from its cache.",
            )
        shape = _known_shape(source)
        if shape is None:
            raise UserError(
                f"--model {source} is no folder here, and the hub cannot be reached ({error}).",
                remedy=f"Give a local folder, or connect once. {_known_names(source)}",
            ) from None
        note = f"The hub cannot be reached: {source} by the shipped table's shape of {shape['name']}."
        return _locate_shape(source, shape, note=note)

    siblings = {file.rfilename: file for file in info.siblings or ()}
    weights = tuple(
        (name, str(siblings[name].blob_id or siblings[name].size)) for name in sorted(_weight_names(siblings))
    )
    card = (info.config or {}).get("tokenizer_config") or {}
    return Located(
        source=source,
        revision=info.sha,
        config=None,
        pretrained=source,
        names=frozenset(siblings),
        weights=weights,
        stored_dtype=_hub_dtype(info.safetensors),
        has_chat_template="chat_template.jinja" in siblings or bool(card.get("chat_template")),
    )


def _require_tokenizer(located: Located) -> None:
    if located.is_shape:
        raise UserError(
            f"--model {located.source}: only its shape is at hand, not its weights and tokenizer."
            + (f" {located.note}" if located.note else ""),
            remedy="autosft plan works with a shape, without --data. "
            "Else give a local folder or connect to the hub.",
        )
    if not located.names & set(TOKENIZER_FILES):
        raise UserError(
            f"--model {located.source} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            remedy="Save it beside the model with tokenizer.save_pretrained(FOLDER).",
        )


def _require_weights(located: Located) -> None:
    if not located.weights:
        foreign = sorted(
            name
            for name in located.names
            if name.endswith(_FOREIGN_SUFFIXES) and name not in _NOT_WEIGHTS and "/" not in name
        )
        raise UserError(
            f"--model {located.source} has no weights"
            + (f" in a known form, only {', '.join(foreign[:3])}." if foreign else "."),
            remedy=what_to_give(
                Path(located.pretrained),
                "Weights are read from model.safetensors or pytorch_model.bin, or the files that an index "
                "beside them names, as save_pretrained writes.",
            ),
        )
    missing = _missing_shards(located)
    if missing:
        raise UserError(
            f"--model {located.source} lacks {len(missing)} of its weight files: {', '.join(missing[:3])}.",
            remedy="Copy or download the folder again.",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads from a local folder, as far as they are there."""
    names = frozenset(path.name for path in folder.iterdir() if path.is_file())
    read = _weight_names(names, _shards_in_index(folder, names))
    return [folder / name for name in sorted(read) if name in names]


def _missing_shards(located: Located) -> list[str]:
    """Return the weight files in a local index that are missing in the folder."""
    return sorted(_shards_in_index(Path(located.pretrained), located.names) - located.names)


def _shards_in_index(folder: Path, names: Collection[str]) -> set[str]:
    """Return the files that the index of a local folder names; none where one file holds all weights."""
    for whole in _WHOLE:
        shards = _read_index(folder / f"{whole}.index.json") if f"{whole}.index.json" in names else set()
        if whole in names:
            return shards if whole in shards else set()
        if shards:
            return shards
    return set()


def _read_index(path: Path) -> set[str]:
    """Return the files that an index of weights names.  Raises UserError for a broken one."""
    remedy = "Copy or download the folder again."
    named = read_json_object(path, remedy=remedy).get("weight_map")
    if not (isinstance(named, dict) and all(isinstance(name, str) for name in named.values())):
        raise UserError(f"{path} has no weight_map of file names.", remedy=remedy)
    return set(named.values())


def _weight_names(names: Collection[str], shards: Collection[str] = ()) -> list[str]:
    """Return the weight files that transformers reads from the top of a folder.

    That is the first of `_WHOLE`, else the shards that its index names: other files, such as
    consolidated.safetensors, hold the same weights for other programs.  `shards` is what the index says, if
    it could be read.
    """
    for whole in _WHOLE:
        if whole in names:
            return [whole]
        if f"{whole}.index.json" in names:
            suffix = Path(whole).suffix
            return sorted(shards) or [
                name
                for name in names
                if re.search(r"-\d+-of-\d+", name) and name.endswith(suffix) and "/" not in name
            ]
    return []


def stored_dtype(source: str) -> str | None:
    """Return the dtype that a model's weights are stored in: "float32", "bfloat16", ...; None if unknown.

    Of a folder by its files, of a GGUF file that of the folder that it becomes, of a hub id by what is in the
    cache, of an adapter's folder that of its base.
    """
    if is_adapter_folder(source):
        base = base_of(source)
        return None if base is None else stored_dtype(base)
    if not source:
        return None
    folder = Path(plain_folder(source, need_weights=False)).expanduser()
    if folder.is_dir():
        found = _stored_dtype(path for path in weight_files(folder) if path.suffix == ".safetensors")
        return found or _configured_dtype(folder / "config.json")
    cached = cached_file(source, "config.json")
    return None if cached is None else _configured_dtype(cached)


def cached_file(source: str, name: str) -> Path | None:
    """Return a file of a hub id that is in the hub's cache; None without one, and for what is no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _configured_dtype(path: Path) -> str | None:
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    found = values.get("dtype") or values.get("torch_dtype")
    return None if found is None else str(found).removeprefix("torch.")


def _stored_dtype(paths: Iterable[Path]) -> str | None:
    """Return the dtype of most bytes in the safetensors files, None without such files."""
    num_bytes: Counter[str] = Counter()
    for path in paths:
        for tensor in read_header(path).values():
            first, last = tensor["data_offsets"]
            num_bytes[tensor["dtype"]] += last - first
    return _DTYPES.get(num_bytes.most_common(1)[0][0]) if num_bytes else None


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
}


def _hub_dtype(safetensors: Any) -> str | None:
    parameters = getattr(safetensors, "parameters", None) or {}
    return _DTYPES.get(max(parameters, key=parameters.__getitem__)) if parameters else None


def _has_chat_template(folder: Path, names: frozenset[str]) -> bool:
    if names & {"chat_template.jinja", "chat_template.json"}:
        return True
    try:
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tokenizer_config, dict) and bool(tokenizer_config.get("chat_template"))


@functools.cache
def _known_shapes() -> tuple[dict[str, Any], ...]:
    text = files("autosft.profiles.data").joinpath("models.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["models"])


def _known_shape(source: str) -> dict[str, Any] | None:
    """Return the table's row for a name or a repository, instruction-tuned variants included."""
    wanted = _plain(source)
    for shape in _known_shapes():
        if wanted in {_plain(shape["name"]), *map(_plain, shape["repositories"])}:
            return shape
    return None


def _plain(name: str) -> str:
    """Reduce "meta-llama/Llama-3.2-1B-Instruct" to "llama-3.2-1b": variants of one shape get one name."""
    last = name.lower().rpartition("/")[2]
    return re.sub(r"(-(instruct|chat|it|pt|base|hf|bnb-4bit|text))+$", "", last)


def _known_names(source: str) -> str:
    """Name the known models that are spelt nearest; all that are known where none is near."""
    shapes = {
        _plain(name): shape for shape in _known_shapes() for name in (shape["name"], *shape["repositories"])
    }
    near = difflib.get_close_matches(_plain(source), shapes, n=3, cutoff=0.7)
    if near:
        names = dict.fromkeys(shapes[name]["repositories"][0] for name in near)
        return f"Nearest of the known models: {', '.join(names)}."
    return f"Shapes known offline: {', '.join(shape['name'] for shape in _known_shapes())}."
