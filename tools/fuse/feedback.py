"""Rounding by which small changes add up: what a column loses is made up for in the columns behind it.

An adapter's change is often smaller than half of a step everywhere, and still moves the outputs, as it moves all
columns one way. With H = E[x x^T] of what flows in, the error of a rounded W is tr((W - Q) H (W - Q)^T); what each
column leaves is taken off those to come, by the Cholesky factor of the inverse of H (GPTQ, Frantar et al. 2022). Here
the grid is given: the one on which the weight stood before. Columns far apart are left alone: H is cut in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...models.decoder import Decoder
from ..evaluate.text import hidden
from ..quantize.gptq import DAMPING, inverse_factor

Grid = tuple[np.ndarray, np.ndarray]  # scales and biases, [rows, groups]
BLOCK = 512  # columns that make up for one another


class Inputs:
    """What flows into the linear maps called `names`, by name, float32 [N, I]; maps that read one array share it."""

    def __init__(self, decoder: Decoder, names: Sequence[str], ids: np.ndarray):
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._last: tuple[object, np.ndarray] | None = None
        decoder.listener = lambda name, x: self._hear(decoder, name.removesuffix(".input"), name, x)
        try:
            for window in ids:
                decoder.ops.numpy(decoder.head(decoder.scope(), hidden(decoder, window)))
        finally:
            decoder.listener = self._last = None

    def _hear(self, decoder: Decoder, owner: str, name: str, x: object) -> None:
        if owner == name or owner not in self._parts:
            return
        if self._last is None or self._last[0] is not x:
            values = np.array(decoder.ops.numpy(x), np.float32)
            self._last = x, values.reshape(-1, values.shape[-1])
        self._parts[owner].append(self._last[1])

    def factors(self, name: str) -> list[np.ndarray] | None:
        """Of each block of columns: the upper triangular U with U^T U = H^-1, float32 [n, n]; None where nothing was
        heard."""
        parts = self._parts.get(name)
        if not parts:
            return None
        if self._last is None or self._last[0] is not parts[0]:
            x = np.concatenate(parts)
            self._last = parts[0], [_inverse_factor(x[:, at : at + BLOCK]) for at in range(0, x.shape[1], BLOCK)]
        return self._last[1]


def _inverse_factor(x: np.ndarray) -> np.ndarray:
    return inverse_factor((x.T @ x).astype(np.float64) / len(x), DAMPING).astype(np.float32)


def fed_back(values: np.ndarray, grid: Grid, bits: int, factors: Sequence[np.ndarray]) -> np.ndarray:
    """Codes uint8 [O, I] of values [O, I] on a grid [O, groups], column after column."""
    columns = np.ascontiguousarray(values.T, np.float32)
    scales, biases = (np.ascontiguousarray(part.T) for part in grid)
    size = len(columns) // len(scales)
    scales = np.where(scales == 0, np.float32(1), scales)
    codes = []
    for at, upper in zip(range(0, len(columns), BLOCK), factors, strict=True):
        groups = slice(at // size, (at + len(upper)) // size)
        codes.append(_block(columns[at : at + len(upper)], scales[groups], biases[groups], bits, upper))
    return np.concatenate(codes).T


def _block(left: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, upper: np.ndarray) -> np.ndarray:
    """left [n, O]: what is still to be rounded, used up on the way -> codes [n, O]."""
    codes, size = np.empty(left.shape, np.uint8), len(left) // len(scales)
    for at in range(0, len(left), size):
        errors, end = np.empty((size, left.shape[1]), np.float32), at + size
        scale, bias = scales[at // size], biases[at // size]
        for j in range(at, end):
            codes[j] = np.clip(np.rint((left[j] - bias) / scale), 0, (1 << bits) - 1)
            errors[j - at] = (left[j] - (codes[j] * scale + bias)) / upper[j, j]
            left[j + 1 : end] -= upper[j, j + 1 : end, None] * errors[j - at]
        left[end:] -= upper[at:end, end:].T @ errors
    return codes
