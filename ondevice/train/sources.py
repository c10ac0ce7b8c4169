"""Where examples come from: JSONL files, or Hugging Face datasets (the extra `datasets`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadFile, BadOption, Unavailable

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
HUB = "hf:"

Line = tuple[str, bytes]  # where it stands ("FILE:LINE"), and its JSON


def find(data: str | Path) -> dict[str, Iterable[Line]]:
    """Split -> its lines, not read yet. data: a JSONL file; a folder with train.jsonl and perhaps valid.jsonl and
    test.jsonl; a folder that the library `datasets` saved; or hf:OWNER/NAME (or hf:OWNER/NAME:CONFIG), a dataset of
    the Hub. Raises BadOption where there is no training data, Unavailable where the library or the dataset cannot be
    had."""
    if str(data).startswith(HUB):
        return _of_splits(str(data), _from_hub(str(data).removeprefix(HUB)))
    path = Path(data)
    if path.is_file():
        return {"train": _of_file(path)}
    if not path.is_dir():
        raise BadOption(f"There is no data at {path}.", "Give a JSONL file, or a folder with train.jsonl.")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _of_splits(str(path), _library().load_from_disk(str(path)))
    found = {split: _first(path, names) for split, names in SPLITS.items()}
    if not found["train"]:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise BadOption(f"{path} has no train.jsonl; there is: {there}.", "Name a file, or add train.jsonl.")
    return {split: _of_file(file) for split, file in found.items() if file}


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / f"{name}.jsonl" for name in names if (folder / f"{name}.jsonl").is_file()), None)


def _of_file(path: Path) -> Iterator[Line]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from None


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise Unavailable("Hugging Face datasets need the package datasets.", "pip install datasets") from None
    return datasets


def _from_hub(name: str) -> Any:
    repo, _, config = name.partition(":")
    try:
        return _library().load_dataset(repo, config or None)
    except Unavailable:
        raise
    except Exception as error:  # the library and the net fail in many ways
        what = " ".join(str(error).split())[:200]
        raise Unavailable(f"The dataset {name} cannot be had: {what}.", "Check its name and the connection.") from None


def _of_splits(name: str, found: Any) -> dict[str, Iterable[Line]]:
    """A dataset, or several by split, as lines."""
    given: Mapping[str, Any] = found if isinstance(found, Mapping) else {"train": found}
    chosen = {split: next((given[n] for n in names if n in given), None) for split, names in SPLITS.items()}
    if chosen["train"] is None:
        raise BadOption(f"{name} has no split named train; there is: {', '.join(given)}.", "Take another dataset.")
    return {split: _of_rows(f"{name}[{split}]", rows) for split, rows in chosen.items() if rows is not None}


def _of_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
    """Fields that a row leaves empty are those that other rows have."""
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", json.dumps(_filled(row), ensure_ascii=False, default=str).encode()


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value
