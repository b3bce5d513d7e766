"""Choose the data files of a folder, and those of them that are for training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosft.profiles.bounded_yaml import construct, read_bounded
from autosft.profiles.dataset.column_map import REGISTRY, ColumnMap, is_registry, registry_entry
from autosft.profiles.dataset.content_kind import note_on, require_readable
from autosft.profiles.dataset.files import SUPPORTED, kind_of
from autosft.profiles.dataset.problems import brief_list
from autosft.profiles.dataset.split_names import split_of
from autosft.profiles.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFiles:
    """The files of one source, by their use."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()  # never trained on; used for evaluation unless other data is given
    columns: ColumnMap | None = None
    said: tuple[str, ...] = ()  # what was chosen and left out, in sentences


def files_of(path: Path, name: str | None = None, *, is_evaluated: bool = False) -> DataFiles:
    """Choose the files of a file or folder.

    `name` is a data set, a configuration, a subfolder or a split of the folder.  Files whose names or folders
    mean validation or test are not trained on; with `is_evaluated` they are the ones that are read.  Raises
    `UserError` if there is no data file, or none to train on.
    """
    if path.is_file() and path.name == REGISTRY and is_registry(path.parent):
        path = path.parent
    if not path.is_dir():
        require_readable(path)
        if name is not None:
            raise UserError(
                f"{path}:{name}: {path} is a file, and a name after a colon chooses within a folder.",
                remedy=f"Give {path} alone, or a weight as in {path}:2",
            )
        note = note_on(path)
        return DataFiles(train=(path,), said=() if note is None else (note,))
    if is_registry(path):
        entry = registry_entry(path, name)
        inner = files_of(entry.path, is_evaluated=is_evaluated)
        said = f"data set {entry.name} of {REGISTRY}, in {entry.path.name}"
        return replace(inner, columns=entry.columns, said=(said, *inner.said))
    splits = _splits_of_card(path, name)
    if splits is None:
        if name is not None and (path / name).is_dir():
            path, name = path / name, None
        splits = _splits_by_name(path)
        if name is not None:
            return _named_split(path, splits, name)
    return _by_use(path, splits, is_evaluated=is_evaluated)


def _by_use(folder: Path, splits: Mapping[str | None, Sequence[Path]], *, is_evaluated: bool) -> DataFiles:
    """Assign files to uses by split; files without a split are for training if no split is "train"."""
    if not any(splits.values()):
        raise UserError(f"{folder} declares no file of data.", remedy="Give a file itself.")
    if is_evaluated:
        use = next(split for split in ("validation", "test", None, "train", *splits) if splits.get(split))
        return DataFiles(train=tuple(splits[use]), said=_left_out(folder, splits, (use,)))
    use = "train" if splits.get("train") else None
    if not splits.get(use):
        others = [path for paths in splits.values() for path in paths]
        raise UserError(
            f"{folder} holds no data to train on, only {_names(folder, others)}.",
            remedy=f"To train on such a file in spite of its name, give the file itself: {others[0]}",
        )
    return DataFiles(
        train=tuple(splits[use]),
        validation=tuple(splits.get("validation", ())),
        said=_left_out(folder, splits, (use, "validation")),
    )


def _left_out(
    folder: Path, splits: Mapping[str | None, Sequence[Path]], used: Sequence[str | None]
) -> tuple[str, ...]:
    others = [path for split, paths in splits.items() if split not in used for path in paths]
    return (f"not read: {_names(folder, others)}",) if others else ()


def _names(folder: Path, paths: Iterable[Path]) -> str:
    return brief_list([path.relative_to(folder).as_posix() for path in paths], 4)


def _named_split(folder: Path, splits: Mapping[str | None, Sequence[Path]], name: str) -> DataFiles:
    files = splits.get(split_of(name)) if split_of(name) else None
    if not files:
        has = brief_list([split for split in splits if split])
        raise UserError(
            f"{folder} has no data set, folder or split {name!r}.",
            remedy=f"It has the splits {has}." if has else None,
        )
    return DataFiles(train=tuple(files), said=(f"read: {_names(folder, files)}",))


def _splits_by_name(folder: Path) -> dict[str | None, list[Path]]:
    """Return the data files below a folder, sorted, by the split that their names or folders indicate."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if kind_of(path) is not None
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in _NO_DATA
        and not path.stem.lower().startswith(_NO_DATA_STEMS)
        and path.is_file()
    ]
    files = _of_saved_data_sets(files)
    if any(kind_of(path) != ".txt" for path in files):  # text files are then notes, licences, lists of names
        files = [path for path in files if kind_of(path) != ".txt"]
    if not files:
        raise UserError(f"{folder} holds no data file.", remedy=f"Expected {SUPPORTED} in it.")
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        splits.setdefault(split_of(path.relative_to(folder).as_posix()), []).append(path)
    return splits


def _of_saved_data_sets(files: Sequence[Path]) -> list[Path]:
    """Leave out Arrow files in a folder of `Dataset.save_to_disk` that are not part of the data set."""
    kept: list[Path] = []
    listed: dict[Path, set[str] | None] = {}
    for path in files:
        if path.parent not in listed:
            listed[path.parent] = _files_of_state(path.parent / "state.json")
        names = listed[path.parent]
        if names is None or path.name in names:
            kept.append(path)
    return kept


def _files_of_state(path: Path) -> set[str] | None:
    """Return the names of the files that make up a data set saved by `datasets`; None for other folders."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        names = {str(file["filename"]) for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{path.parent} is a selection of a data set, saved by an old version of datasets.",
            remedy="Save it again: datasets.load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER)",
        )
    return names


# The dataset card of a repository: README.md with a YAML header


def _splits_of_card(folder: Path, name: str | None) -> dict[str | None, list[Path]] | None:
    """Return the files by split that a dataset card declares in `configs`; None if it declares none."""
    configs = [
        config
        for config in _configs(folder / "README.md")
        if config.get("data_files") or config.get("data_dir")
    ]
    if not configs:
        return None
    config = _chosen(folder, configs, name)
    if config is None:
        return None
    base = folder / str(config.get("data_dir") or ".")
    if not base.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder / 'README.md'} names {config['data_dir']}, which lies outside of the folder."
        )
    if not config.get("data_files"):
        return _splits_by_name(base)
    splits: dict[str | None, list[Path]] = {}
    for split, pattern in _patterns(config["data_files"]):
        splits.setdefault(split, []).extend(_matching(folder, base, pattern))
    if None in splits and len(splits) > 1 and "train" not in splits:
        raise UserError(
            f"{folder / 'README.md'} declares splits of which none is for training.",
            remedy="Give the file itself.",
        )
    return splits


def _configs(card: Path) -> list[Mapping[str, Any]]:
    import yaml

    try:
        text = read_bounded(card)
        if not text.startswith("---"):
            return []
        header = construct(yaml.SafeLoader(text[3:].partition("\n---")[0]))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    configs = header.get("configs") if isinstance(header, Mapping) else None
    return [config for config in configs if isinstance(config, Mapping)] if isinstance(configs, list) else []


def _chosen(folder: Path, configs: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any] | None:
    names = [str(config.get("config_name") or "default") for config in configs]
    if name is not None:
        return configs[names.index(name)] if name in names else None
    default = [config for config in configs if config.get("default") is True]
    if not default and "default" in names:
        default = [configs[names.index("default")]]
    default = default or (list(configs) if len(configs) == 1 else [])
    if not default:
        raise UserError(
            f"{folder / 'README.md'} declares {len(configs)} data sets: {brief_list(names)}.",
            remedy=f"Name one: {folder}:{names[0]}",
        )
    return default[0]


def _patterns(data_files: Any) -> list[tuple[str | None, str]]:
    """Return split and pattern of each entry of `data_files`; without a split it is for training."""
    if isinstance(data_files, str):
        return [("train", data_files)]
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    found: list[tuple[str | None, str]] = []
    for entry in data_files if isinstance(data_files, list) else ():
        if isinstance(entry, str):
            found.append(("train", entry))
        if not isinstance(entry, Mapping):
            continue
        split = split_of(str(entry.get("split") or "train"))
        paths = entry.get("path")
        paths = paths if isinstance(paths, str | list) else []
        found += [(split, str(path)) for path in ([paths] if isinstance(paths, str) else paths)]
    return found


def _matching(folder: Path, base: Path, pattern: str) -> list[Path]:
    where = folder / "README.md"
    try:
        found = sorted(path for path in base.glob(pattern.removeprefix("./")) if path.is_file())
    except (ValueError, NotImplementedError):
        found = []
    if not found:
        raise UserError(
            f"{where} names {pattern}, and there is no such file.",
            remedy="Fetch it (git lfs pull), or give another file itself.",
        )
    for path in found:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{where} names {pattern}, which lies outside of the folder.")
        require_readable(path)
    return found


#: Files next to data that have a data suffix.
_NO_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_NO_DATA_STEMS = ("readme", "license", "licence", "notice", "requirements", "citation")
