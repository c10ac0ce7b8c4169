"""Hugging Face folders: config.json, one or many safetensors, the parts of quantized tensors joined into one each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadFile
from . import safetensors
from .files import Entry, Mapped, damaged, read_object
from .quantized import AnyEntry, join

INDEX = "model.safetensors.index.json"
MAX_INDEX = 128 << 20
SIDE_FILES = {".json", ".jinja", ".model", ".txt"}  # never code: what a model folder says is data
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, AnyEntry]]:
    """config.json and the place of every tensor.

    Raises BadFile for what is missing, damaged or dangerous, Unsupported for a quantization that isn't read here.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise BadFile(f"{path} has no config.json.", _what_else(path))
    config = read_object(config_path)
    entries: dict[str, Entry] = {}
    for shard, names in _shards(path):
        found = safetensors.read(Mapped(shard))
        for name in names or found:
            if name not in found:
                raise damaged(shard, f"it lacks the tensor {name!r} that {INDEX} places there")
            if name in entries:
                raise damaged(shard, f"the tensor {name!r} is in another file as well")
            entries[name] = found[name]
    return config, join(config_path, config, entries)


def side_files(path: Path) -> dict[str, Path]:
    """The files beside the weights that a tokenizer or a copy of the model may need, by name."""
    wanted = (f for f in sorted(path.iterdir()) if f.suffix in SIDE_FILES and f.name not in ("config.json", INDEX))
    return {file.name: file for file in wanted if file.is_file()}


def _what_else(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "It is an adapter: give the model's folder, and this one with --adapter."
    return "Give a Hugging Face folder (config.json and safetensors) or a .gguf file."


def _shards(path: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """The files to read and the tensors to take from each (None: all)."""
    if (path / INDEX).is_file():
        yield from _indexed(path)
        return
    single = path / "model.safetensors"
    shards = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not shards:
        raise _no_weights(path)
    for shard in shards:
        yield shard, None


def _indexed(path: Path) -> Iterator[tuple[Path, list[str]]]:
    index = read_object(path / INDEX, MAX_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise damaged(path / INDEX, "it has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not _plain_name(shard):
            raise damaged(path / INDEX, f"it places {name!r} in {shard!r:.120}, not a .safetensors file of its folder")
        shards.setdefault(shard, []).append(name)
    for shard, names in sorted(shards.items()):
        yield path / shard, names


def _plain_name(shard: str) -> bool:
    """Whether it names a .safetensors file of the same folder: no way out by `..`, a separator or an absolute path."""
    return shard.endswith(".safetensors") and shard.isprintable() and not {"/", "\\", ":"} & set(shard)


def _no_weights(path: Path) -> BadFile:
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
    if pickles:
        return BadFile(
            f"{path} has its weights as a pickle only ({pickles[0]}), which could run any code when read.",
            "Get a version with .safetensors files, or convert it where you trust it: save_pretrained in transformers.",
        )
    return BadFile(f"{path} has a config.json but no .safetensors files.", "Download it again, with its weights.")
