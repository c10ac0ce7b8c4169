"""Hugging Face folders: config.json, one or many safetensors, MLX's quantized triples joined into one tensor each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadFile, Unsupported
from ..schemes import AFFINE_BITS, mxfp4_blocks
from ..tensors import Affine, Blocks, Tensor
from . import safetensors
from .files import Entry, Mapped, damaged, read_object

INDEX = "model.safetensors.index.json"
MAX_CONFIG = 16 << 20
MAX_INDEX = 128 << 20
SIDE_FILES = {".json", ".jinja", ".model", ".txt"}  # never code: what a model folder says is data
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class AffineEntry:
    """Where the three parts of an MLX-quantized tensor lie."""

    weight: Entry
    scales: Entry
    biases: Entry
    shape: tuple[int, ...]
    format: Affine

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes

    def load(self) -> Tensor:
        loaded = {part: getattr(self, part).load().parts["weight"] for part in ("weight", "scales", "biases")}
        return Tensor(self.shape, self.format, loaded)


@dataclass(frozen=True)
class Mxfp4Entry:
    """Where the two parts of an MXFP4 tensor lie: codes, two neighbours to a byte, and an exponent for each 32."""

    codes: Entry
    exponents: Entry
    shape: tuple[int, ...]

    @property
    def format(self) -> Blocks:
        return Blocks("MXFP4")

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.exponents.nbytes

    def load(self) -> Tensor:
        """Copied: the bytes are put in the order of a GGUF's blocks."""
        codes, exponents = (entry.load().parts["weight"] for entry in (self.codes, self.exponents))
        codes = np.ascontiguousarray(codes).view(np.uint8).reshape(*exponents.shape, 16)
        return Tensor(self.shape, self.format, {"weight": mxfp4_blocks(codes, exponents)})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Entry | AffineEntry | Mxfp4Entry]]:
    """config.json and the place of every tensor.

    Raises BadFile for what is missing, damaged or dangerous, Unsupported for a quantization that isn't read here.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise BadFile(f"{path} has no config.json.", _what_else(path))
    config = read_object(config_path, MAX_CONFIG)
    entries: dict[str, Entry] = {}
    for shard, names in _shards(path):
        found = safetensors.read(Mapped(shard))
        for name in names or found:
            if name not in found:
                raise damaged(shard, f"it lacks the tensor {name!r} that {INDEX} places there")
            if name in entries:
                raise damaged(shard, f"the tensor {name!r} is in another file as well")
            entries[name] = found[name]
    return config, _join(config_path, config, entries)


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


# ------------------------------------------------------------------------------------------------ MLX's quantization


def _join(path: Path, config: dict[str, Any], entries: dict[str, Entry]) -> dict[str, Entry | AffineEntry | Mxfp4Entry]:
    settings = _settings(path, config)
    joined: dict[str, Entry | AffineEntry | Mxfp4Entry] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        weight = entries.get(f"{module}.weight")
        packed = weight is not None and weight.format.dtype == "uint32" and f"{module}.scales" in entries
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in entries:
            joined[name] = _mxfp4(entry, entries[f"{name.removesuffix('_blocks')}_scales"])
        elif name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in entries:
            continue
        elif not packed:
            joined[name] = entry
        elif part == "weight" and entries[f"{module}.scales"].format.dtype == "uint8":
            joined[name] = _mxfp4(entry, entries[f"{module}.scales"])
        elif part == "weight":
            joined[name] = _affine(path, settings, module, entries)
        elif part not in ("scales", "biases"):
            joined[name] = entry
    return joined


def _settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """MLX's `quantization` block: the default and, by module, what differs. {} when the model isn't quantized."""
    settings = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise damaged(path, "its quantization is not an object")
    method = settings.get("quant_method") or settings.get("mode", "affine")
    if method not in ("affine", "mxfp4"):
        raise Unsupported(
            f"{path.parent} is quantized with {method!r:.40}, which is not read here.",
            "Get the original weights, an MLX version (affine or mxfp4) or a GGUF.",
        )
    return settings


def _mxfp4(codes: Entry, exponents: Entry) -> Mxfp4Entry:
    *rows, groups = exponents.shape or (0,)
    if exponents.format.dtype != "uint8" or codes.nbytes != 16 * exponents.nbytes or not groups:
        shapes = f"codes {list(codes.shape)}, exponents {list(exponents.shape)}"
        raise damaged(codes.file.path, f"a tensor in MXFP4 does not fit: {shapes}")
    return Mxfp4Entry(codes, exponents, (*rows, 32 * groups))


def _affine(path: Path, settings: dict[str, Any], module: str, entries: dict[str, Entry]) -> AffineEntry:
    weight, scales, biases = (entries.get(f"{module}.{part}") for part in ("weight", "scales", "biases"))
    bits, group = _bits_and_group(path, settings, module)
    if biases is None or scales.format != biases.format or scales.shape != biases.shape:
        raise damaged(weight.file.path, f"the scales and biases of {module!r} do not match")
    if scales.format.dtype not in ("float16", "bfloat16", "float32"):
        raise damaged(weight.file.path, f"the scales of {module!r} are {scales.format.dtype}")
    columns = scales.shape[-1] * group if scales.shape else 0
    if weight.shape != (*scales.shape[:-1], columns * bits // 32) or columns * bits % 32 or columns % 8 or not columns:
        raise damaged(
            weight.file.path,
            f"{module!r} with {bits} bits in groups of {group} does not fit: "
            f"weight {list(weight.shape)}, scales {list(scales.shape)}",
        )
    shape = (*weight.shape[:-1], columns)
    return AffineEntry(weight, scales, biases, shape, Affine(bits, group, scales.format.dtype))


def _bits_and_group(path: Path, settings: dict[str, Any], module: str) -> tuple[int, int]:
    own = settings.get(module, settings)
    if not isinstance(own, dict):
        raise damaged(path, f"its quantization says {own!r:.40} for {module!r}, which is quantized")
    if own.get("mode", "affine") != "affine":
        raise Unsupported(
            f"{path.parent} stores {module!r} as {own['mode']!r:.40}, which is not read here.",
            "Get an MLX version in affine mode, or the original weights.",
        )
    bits, group = own.get("bits"), own.get("group_size")
    if type(bits) is not int or bits not in AFFINE_BITS or type(group) is not int or not 0 < group <= 1 << 20:
        raise damaged(path, f"its quantization gives {module!r} {bits!r:.20} bits in groups of {group!r:.20}")
    return bits, group
