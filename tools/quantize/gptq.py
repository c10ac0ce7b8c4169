"""Rounding that makes up for its errors (GPTQ, Frantar et al. 2022), and the same without (search).

With y = W x and H = sum of x x^T over the calibration set, the error of a rounded W is tr((W - Q) H (W - Q)^T). Columns
are rounded one after the other; what each leaves is taken off the columns to come, by the Cholesky factor of the
inverse of H, so that their rounding can undo it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...tensors import Affine, Tensor
from .fitting import assemble, decode, encode, fit
from .parallel import side_by_side

DAMPING = 0.01  # of the mean of H's diagonal, added to it: what was not seen may still come
ROWS = 2048  # rounded at once: few enough that their columns stay in the cache, enough for NumPy to be busy
NUMBERS = 1 << 18  # whose groups are fitted at once
BLOCK = 16  # columns of a group that correct one another one by one; what lies behind gets all of theirs in one product


@dataclass(frozen=True)
class Feedback:
    """What maps that read the same inputs share. upper [I, I] float32: the triangle by which later columns make up for
    earlier ones. remaining [I]: what then is left of H's diagonal."""

    upper: np.ndarray
    remaining: np.ndarray


def feedback(hessian: np.ndarray, damping: float = DAMPING) -> Feedback:
    """Of a Hessian [I, I]."""
    upper = inverse_factor(hessian, damping)
    return Feedback(upper.astype(np.float32), 1 / np.square(np.diag(upper)))


def gptq(values: np.ndarray, known: Feedback, form: Affine) -> Tensor:
    """values [O, I] float32 -> the tensor; a group's scale and bias are fitted when its turn comes, by the error that
    remains after feedback."""
    return _in_pieces(lambda piece: _walk(piece, known, form), values, ROWS, form)


def search(values: np.ndarray, weights: np.ndarray, form: Affine) -> Tensor:
    """Each number to the nearest value; scales and biases by the error weighted with `weights` [I]."""
    return _in_pieces(lambda piece: _fitted(piece, weights, form), values, max(1, NUMBERS // values.shape[1]), form)


Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes [I, R] uint8, scales and biases [I / group, R]


def _in_pieces(work: Callable[[np.ndarray], Rounded], values: np.ndarray, rows: int, form: Affine) -> Tensor:
    made = side_by_side(work, [values[at : at + rows] for at in range(0, len(values), rows)])
    return assemble(*(np.concatenate(parts, -1) for parts in zip(*made, strict=True)), form)


def _fitted(piece: np.ndarray, weights: np.ndarray, form: Affine) -> Rounded:
    """Rows [R, I], all groups at once."""
    rows, columns = piece.shape
    groups = np.ascontiguousarray(piece.reshape(rows, -1, form.group_size).transpose(1, 2, 0))
    scales, biases = fit(groups, np.reshape(weights, groups.shape[:2]), form)
    codes = encode(groups, scales, biases, form.bits).astype(np.uint8)
    return codes.reshape(columns, rows), scales, biases


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with U^T U = H^-1, float64; H damped until it has an inverse."""
    return _damped(hessian, damping, lambda h: _triangles(h[::-1, ::-1])[1][::-1, ::-1])


def remaining(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Feedback's `remaining` alone, [I] float64: the diagonal of H's factors, from the last column to the first."""
    factor = _damped(hessian, damping, lambda h: np.linalg.cholesky(h[::-1, ::-1]))
    return np.square(np.diag(factor)[::-1])


def _damped(hessian: np.ndarray, damping: float, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """work of H with `damping` of its mean added to the diagonal; of ten times as much, as long as that fails."""
    damped, diagonal = hessian.astype(np.float64), np.diag(hessian)
    mean = diagonal.mean() or 1.0
    diagonal = np.where(diagonal > 0, diagonal, mean)
    while True:
        np.fill_diagonal(damped, diagonal + damping * mean)
        try:
            return work(damped)
        except np.linalg.LinAlgError:
            damping = 10 * damping or DAMPING


def _triangles(positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower Cholesky factor and its inverse, by halves: nearly all of it is products of matrices, which NumPy does
    far faster than its Cholesky. Raises LinAlgError unless the matrix is positive definite."""
    size = len(positive)
    if size <= 64:
        factor = np.linalg.cholesky(positive)
        return factor, np.linalg.inv(factor)
    half = size // 2
    factor, inverse = np.zeros((2, size, size))
    first, first_inverse = _triangles(positive[:half, :half])
    below = positive[half:, :half] @ first_inverse.T
    last, last_inverse = _triangles(positive[half:, half:] - below @ below.T)
    factor[:half, :half], factor[half:, :half], factor[half:, half:] = first, below, last
    inverse[:half, :half], inverse[half:, half:] = first_inverse, last_inverse
    inverse[half:, :half] = -last_inverse @ (below @ first_inverse)
    return factor, inverse


def _walk(piece: np.ndarray, known: Feedback, form: Affine) -> Rounded:
    """Rows [R, I], group by group."""
    left = np.ascontiguousarray(piece.T)  # what is still to be rounded, [I, R]
    columns, size, upper = len(left), form.group_size, known.upper
    codes, errors = np.empty(left.shape, np.uint8), np.empty((size, left.shape[1]), np.float32)
    scales, biases = np.empty((2, columns // size, left.shape[1]), np.float32)
    for g, at in enumerate(range(0, columns, size)):
        end = at + size
        scales[g], biases[g] = fit(left[at:end], known.remaining[at:end], form)
        for first in range(at, end, BLOCK):
            last, made = first + BLOCK, errors[first - at : first - at + BLOCK]
            grid = scales[g], biases[g], form.bits
            _round_block(left[first:last], upper[first:last, first:last], *grid, codes[first:last], made)
            left[last:end] -= upper[first:last, last:end].T @ made
        left[end:] -= upper[at:end, end:].T @ errors
    return codes, scales, biases


def _round_block(
    left: np.ndarray, upper: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int,
    codes: np.ndarray, errors: np.ndarray,
) -> None:  # fmt: skip
    """Columns [n, R] rounded in turn, each taking the error of those before; codes and scaled errors are filled in."""
    for j in range(len(left)):
        column = left[j : j + 1]
        code = encode(column, scale, bias, bits)
        codes[j] = code[0]
        errors[j] = (column - decode(code, scale, bias, code))[0] / upper[j, j]
        left[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
