"""Host tensors: dense and quantized, memory-mapped; no device and no framework.

A `Tensor` is a logical shape, a format (how numbers are stored) and the stored parts as NumPy arrays. The parts of a
tensor read from a file are views of the file's memory map: nothing is read before someone touches it.
bfloat16 and float8, which NumPy lacks, are held as their bit patterns; `format.dtype` says which it is.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

STORAGE = {  # dtype name -> the NumPy dtype that stores it
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint32": np.dtype(np.uint32),
    "float8_e4m3fn": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Dense:
    """Plain numbers. parts: `weight`, an array of the logical shape in `STORAGE[dtype]`."""

    dtype: str


@dataclass(frozen=True)
class Affine:
    """MLX's convention: w = scale * code + bias, `group_size` neighbours along the last axis share scale and bias.

    parts: `weight` uint32 [..., O, I * bits / 32] (codes packed in order, lowest bits first, across word borders),
    `scales` and `biases` [..., O, I / group_size] in `STORAGE[dtype]`.
    """

    bits: int
    group_size: int
    dtype: str  # of scales and biases: float16, bfloat16 or float32


@dataclass(frozen=True)
class Blocks:
    """One of GGUF's block types, bytes as in the file. parts: `weight` uint8 [..., O, bytes per row].

    `kind` is ggml's name: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (affine: `schemes.to_affine` keeps their codes exactly) or
    Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, MXFP4 (schemes of their own); or FP8, which GGUF lacks.
    """

    kind: str


@dataclass(frozen=True)
class Tensor:
    """A named-by-its-holder host tensor.

    shape: the logical shape, matrices as [out, in] and stacked experts as [E, out, in].
    format: Dense, Affine or Blocks. parts: the stored arrays, by name (see the formats).
    """

    shape: tuple[int, ...]
    format: Dense | Affine | Blocks
    parts: dict[str, np.ndarray] = field(repr=False)

    @property
    def quantized(self) -> bool:
        return not isinstance(self.format, Dense)

    @property
    def size(self) -> int:
        """Numbers in the tensor (parameters), whatever they are stored as."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(part.nbytes for part in self.parts.values())


class Stack(Tensor):
    """Tensors of one shape and format (a layer's experts), [E, ...], read one by one when they are asked for. They are
    put together, in memory of their own, where somebody wants `parts`."""

    def __init__(
        self, count: int, piece: Callable[[int], Tensor], done: Callable[[int], None] = lambda index: None
    ):  # fmt: skip
        """piece: one of them. done: gives back the memory of the pages that were read for it."""
        first = piece(0)
        for name, value in (
            ("shape", (count, *first.shape)),
            ("format", first.format),
            ("piece", piece),
            ("done", done),
        ):
            object.__setattr__(self, name, value)

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        pieces = [self.piece(index).parts for index in range(self.shape[0])]
        return {name: np.stack([parts[name] for parts in pieces]) for name in pieces[0]}

    @cached_property
    def nbytes(self) -> int:
        return self.shape[0] * self.piece(0).nbytes


def file_of(part: np.ndarray) -> tuple[mmap.mmap, int] | None:
    """The memory map an array looks into and the map's address, or None for ordinary memory."""
    while isinstance(part.base, np.ndarray):
        part = part.base
    owner = getattr(part.base, "obj", part.base)
    return (owner, part.__array_interface__["data"][0]) if isinstance(owner, mmap.mmap) else None


def blank(shape: tuple[int, ...], form: Dense | Affine) -> Tensor:
    """A tensor of zeros that takes no memory, with the `nbytes` of a real one: for working out what one would take."""

    def zeros(dtype: str, columns: int) -> np.ndarray:
        return np.broadcast_to(np.zeros((), STORAGE[dtype]), (*shape[:-1], columns))

    if isinstance(form, Dense):
        return Tensor(shape, form, {"weight": np.broadcast_to(np.zeros((), STORAGE[form.dtype]), shape)})
    groups, words = shape[-1] // form.group_size, shape[-1] * form.bits // 32
    parts = {"weight": zeros("uint32", words), "scales": zeros(form.dtype, groups), "biases": zeros(form.dtype, groups)}
    return Tensor(shape, form, parts)


def dense(values: np.ndarray) -> Tensor:
    """A dense tensor over an ordinary NumPy array (float32, float16, integers)."""
    return Tensor(tuple(values.shape), Dense(values.dtype.name), {"weight": values})


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _e4m3fn(octets: np.ndarray) -> np.ndarray:
    """The numbers that octets stand for: sign, four bits of exponent, three of mantissa, no infinities (Micikevicius et
    al. 2022, FP8 Formats for Deep Learning)."""
    exponent, mantissa = (octets >> 3 & 15).astype(np.int32), (octets & 7).astype(np.float32)
    sizes = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    return np.where(octets & 127 == 127, np.nan, np.where(octets >> 7, -sizes, sizes)).astype(np.float32)


E4M3FN = _e4m3fn(np.arange(256, dtype=np.uint8))


def floats(part: np.ndarray, dtype: str) -> np.ndarray:
    """A stored part as float32: bit patterns widened, everything else cast (no copy when float32 already)."""
    if dtype == "float8_e4m3fn":
        return E4M3FN[part]
    return bf16_to_f32(part) if dtype == "bfloat16" else part.astype(np.float32, copy=False)


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values -> how `dtype` is stored."""
    return f32_to_bf16(values) if dtype == "bfloat16" else values.astype(STORAGE[dtype], copy=False)
