"""An optimizer's moments in eight bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861).

Numbers are divided by the largest of their block; what is left of each, from 0 to 1, is written as one of some levels
that lie close together in each of seven powers of ten. Backends compute with these tables; NumPy's `compress` and
`expand` say what they mean.

The first moment has a sign and 7 bits. Of the second its root is kept, in 8 bits: what an update divides by. A root
spans half as many powers of ten as its square, so that small ones beside large ones do not become 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

BLOCK = 256  # numbers that share a scale
FEWEST = 4096  # numbers an array must have: norms and biases are too few to be worth the error
PLAIN = ("m", "v")  # what an optimizer keeps of a parameter, behind its name
PACKED = ("m", "m_scale", "r", "r_scale")  # and in eight bits
DECADES = 7
SHIFT = 17  # a float's bits without these are its place in `starts`: sign, exponent and six bits behind the point


@dataclass(frozen=True)
class Code:
    """levels float32 [n], ascending from 0; edges float32 [n + 1]: level i is nearest from edges[i] to edges[i + 1];
    starts int32: by a float's upper bits, the level of the least number with these bits: of any other it is that or
    one of the next two."""

    levels: np.ndarray
    edges: np.ndarray
    starts: np.ndarray


@cache
def code(bits: int) -> Code:
    """bits: 7 or 8, of a number from 0 to 1."""
    levels = [0.0]
    for i in range(DECADES):
        borders = np.linspace(0.1, 1, 2 ** (i + bits - DECADES) + 1)
        levels += (10.0 ** (i - DECADES + 1) * (borders[:-1] + borders[1:]) / 2).tolist()
    levels = np.array([*levels, 1.0][: 2**bits], np.float32)
    edges = np.concatenate([[0], (levels[:-1] + levels[1:]) / 2, [np.inf]]).astype(np.float32)
    least = (np.arange((0x3F800000 >> SHIFT) + 1, dtype=np.uint32) << SHIFT).view(np.float32)
    return Code(levels, edges, (np.searchsorted(edges, least, side="right") - 1).astype(np.int32))


@cache
def levels(signed: bool) -> np.ndarray:
    """What each of the 256 codes stands for."""
    table = code(7 if signed else 8).levels
    return np.concatenate([table, -table]) if signed else table


def packed(size: int, bits: int) -> bool:
    """Whether the moments of an array of this size are kept in eight bits."""
    return bits == 8 and size >= FEWEST


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def compress(values: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """float32 of any shape, without a sign unless `signed` -> int32 [blocks * BLOCK / 4], four codes in each, and the
    blocks' scales, float32."""
    padded = np.zeros(blocks(values.size) * BLOCK, np.float32)
    padded[: values.size] = values.reshape(-1)
    padded = padded.reshape(-1, BLOCK)
    scales = np.abs(padded).max(axis=1)
    share = np.abs(padded) * (1 / np.where(scales == 0, np.float32(1), scales))[:, None]
    table = code(7 if signed else 8)
    found = table.starts[np.minimum(share, 1).view(np.int32) >> SHIFT]
    for _ in range(2):
        found = found + (share >= table.edges[found + 1])
    found = found + 128 * (padded < 0) if signed else found
    return found.astype(np.uint8).reshape(-1).view(np.int32), scales


def expand(codes: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], signed: bool) -> np.ndarray:
    """What `compress` made, as float32 of that shape again."""
    values = levels(signed)[codes.view(np.uint8)].reshape(-1, BLOCK) * scales[:, None]
    return values.reshape(-1)[: np.prod(shape, dtype=int)].reshape(shape)
