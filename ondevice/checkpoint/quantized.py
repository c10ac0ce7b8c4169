"""Quantized tensors of a folder, whose parts are stored apart: MLX's (codes, scales, biases), MXFP4 (codes, exponents)
and FP8 as DeepSeek publishes it (codes, a scale for each block of 128 rows and columns)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..schemes import AFFINE_BITS, FP8, FP8_BLOCK, fp8_blocks, mxfp4_blocks
from ..tensors import STORAGE, Affine, Blocks, Dense, Tensor, dense, floats
from .files import Entry, damaged

FLOAT8 = "float8_e4m3fn"


@dataclass(frozen=True)
class AffineEntry:
    """Where the three parts of an MLX-quantized tensor lie."""

    weight: Entry
    scales: Entry
    biases: Entry
    shape: tuple[int, ...]
    format: Affine

    @property
    def places(self) -> tuple[Entry, ...]:
        return self.weight, self.scales, self.biases

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.places)

    def row(self, index: int) -> AffineEntry:
        return AffineEntry(*(place.row(index) for place in self.places), (1, *self.shape[1:]), self.format)

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
    def places(self) -> tuple[Entry, ...]:
        return self.codes, self.exponents

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.places)

    def row(self, index: int) -> Mxfp4Entry:
        return Mxfp4Entry(self.codes.row(index), self.exponents.row(index), (1, *self.shape[1:]))

    def load(self) -> Tensor:
        """Copied: the bytes are put in the order of a GGUF's blocks."""
        codes, exponents = (entry.load().parts["weight"] for entry in (self.codes, self.exponents))
        codes = np.ascontiguousarray(codes).view(np.uint8).reshape(*exponents.shape, 16)
        return Tensor(self.shape, self.format, {"weight": mxfp4_blocks(codes, exponents)})


@dataclass(frozen=True)
class Float8Entry:
    """Where the codes of an FP8 tensor lie, and the scales by which blocks of `block` rows and columns are multiplied
    (None: by 1)."""

    codes: Entry
    scales: Entry | None
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def format(self) -> Blocks | Dense:
        """Dense where rows do not fall into our blocks of 128, each under one scale."""
        whole = self.shape and self.shape[-1] % FP8_BLOCK == 0
        alone = self.scales is None or self.block[1] % FP8_BLOCK == 0 or self.block[1] >= self.shape[-1]
        return FP8 if len(self.shape) > 1 and whole and alone else Dense("float32")

    @property
    def places(self) -> tuple[Entry, ...]:
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.places)

    def row(self, index: int) -> Float8Entry:
        scales = self.scales and (self.scales.row(index) if self.scales.shape[0] > 1 else self.scales)
        return Float8Entry(self.codes.row(index), scales, self.block)

    def load(self) -> Tensor:
        """Copied: every row gets its scales beside its codes, so that it can be moved alone."""
        codes, step = self.codes.load().parts["weight"], FP8_BLOCK if self.format == FP8 else 1
        columns = np.arange(0, self.shape[-1] if self.shape else 1, step)
        scales = np.ones((*self.shape[:-1], len(columns)), np.float32)
        if self.scales is not None:
            stored = self.scales.load()
            grid = floats(stored.parts["weight"], stored.format.dtype)
            rows = np.arange(self.shape[-2]) // self.block[0]
            scales = grid[..., rows[:, None], columns // self.block[1]]
        if step == FP8_BLOCK:
            return Tensor(self.shape, FP8, {"weight": fp8_blocks(codes, scales)})
        return dense(floats(codes, FLOAT8) * scales.reshape(self.shape))


AnyEntry = Entry | AffineEntry | Mxfp4Entry | Float8Entry


def join(path: Path, config: dict[str, Any], entries: dict[str, Entry]) -> dict[str, AnyEntry]:
    """The tensors of a folder whose config.json, at `path`, is `config`. Raises BadFile for parts that do not fit,
    Unsupported for a quantization that isn't read here."""
    settings = _settings(path, config)
    joined: dict[str, AnyEntry] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        weight = entries.get(f"{module}.weight")
        packed = weight is not None and weight.format.dtype == "uint32" and f"{module}.scales" in entries
        if _beside(name, entries):
            continue
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in entries:
            joined[name] = _mxfp4(entry, entries[f"{name.removesuffix('_blocks')}_scales"])
        elif entry.format.dtype == FLOAT8:
            joined[name] = _float8(path, settings, name, entries)
        elif not packed:
            joined[name] = entry
        elif part == "weight" and entries[f"{module}.scales"].format.dtype == "uint8":
            joined[name] = _mxfp4(entry, entries[f"{module}.scales"])
        elif part == "weight":
            joined[name] = _affine(path, settings, module, entries)
        elif part not in ("scales", "biases"):
            joined[name] = entry
    return joined


def _beside(name: str, entries: dict[str, Entry]) -> bool:
    """Whether a tensor is but the scales of another: MXFP4's, FP8's."""
    codes = {"_scales": "_blocks", "_scale_inv": ""}
    return any(name.endswith(end) and name.removesuffix(end) + of in entries for end, of in codes.items())


def _settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """MLX's `quantization` block: the default and, by module, what differs. {} when the model isn't quantized."""
    settings = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise damaged(path, "its quantization is not an object")
    method = settings.get("quant_method") or settings.get("mode", "affine")
    if method not in ("affine", "mxfp4", "fp8"):
        raise Unsupported(
            f"{path.parent} is quantized with {method!r:.40}, which is not read here.",
            "Get the original weights, an FP8 or MLX version (affine or mxfp4), or a GGUF.",
        )
    return settings


def _mxfp4(codes: Entry, exponents: Entry) -> Mxfp4Entry:
    *rows, groups = exponents.shape or (0,)
    if exponents.format.dtype != "uint8" or codes.nbytes != 16 * exponents.nbytes or not groups:
        shapes = f"codes {list(codes.shape)}, exponents {list(exponents.shape)}"
        raise damaged(codes.file.path, f"a tensor in MXFP4 does not fit: {shapes}")
    return Mxfp4Entry(codes, exponents, (*rows, 32 * groups))


def _float8(path: Path, settings: dict[str, Any], name: str, entries: dict[str, Entry]) -> Float8Entry:
    codes, scales = entries[name], entries.get(f"{name}_scale_inv")
    if scales is None:
        if settings.get("quant_method") == "fp8":
            raise damaged(codes.file.path, f"{name!r} is stored in eight bits, without its scales {name}_scale_inv")
        return Float8Entry(codes, None, (1, 1))
    if scales.format.dtype not in ("float32", "float16", "bfloat16"):
        raise damaged(scales.file.path, f"the scales of {name!r} are {scales.format.dtype}")
    block = settings.get("weight_block_size") or codes.shape[-2:]  # none: one scale for the whole
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise damaged(path, f"its quantization has blocks of {block!r:.40}")
    *stack, rows, columns = codes.shape if len(codes.shape) > 1 else (0, 0)
    if rows and scales.nbytes == STORAGE[scales.format.dtype].itemsize:
        one = Entry(scales.file, scales.offset, (1,) * len(codes.shape), scales.format, scales.nbytes)
        return Float8Entry(codes, one, codes.shape[-2:])
    if not rows or scales.shape != (*stack, -(-rows // block[0]), -(-columns // block[1])):
        shapes = f"{list(codes.shape)} in blocks of {list(block)}, scales {list(scales.shape)}"
        raise damaged(codes.file.path, f"{name!r} does not fit: {shapes}")
    return Float8Entry(codes, scales, tuple(block))


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
