"""Rounding that makes up for its errors (GPTQ, Frantar et al. 2022), and the same without (search).

With y = W x and H = sum of x x^T over the calibration set, the error of a rounded W is tr((W - Q) H (W - Q)^T). Columns
are rounded one after the other; what each leaves is taken off the columns to come, by the Cholesky factor of the
inverse of H, so that their rounding can undo it.
"""

from __future__ import annotations

import numpy as np

from ...tensors import Affine, Tensor
from .fitting import assemble, decode, encode, fit
from .parallel import side_by_side

DAMPING = 0.01  # of the mean of H's diagonal, added to it: what was not seen may still come
ROWS = 2048  # rounded at once: their columns stay in the cache


def gptq(values: np.ndarray, hessian: np.ndarray, form: Affine, damping: float = DAMPING) -> Tensor:
    """values [O, I] float32, hessian [I, I] -> the tensor; a group's scale and bias are fitted when its turn comes, by
    the error that H says remains after feedback."""
    upper = inverse_factor(hessian, damping)
    remaining = 1 / np.square(np.diag(upper))  # of H's diagonal, once the later columns make up for what they can
    pieces = [values[at : at + ROWS] for at in range(0, len(values), ROWS)]
    made = side_by_side(lambda piece: _walk(piece, upper.astype(np.float32), remaining, form), pieces)
    codes, scales, biases = (np.concatenate(parts, -1) for parts in zip(*made, strict=True))
    return assemble(codes, scales, biases, form)


def search(values: np.ndarray, weights: np.ndarray, form: Affine) -> Tensor:
    """Each number to the nearest value; scales and biases by the error weighted with `weights` [I]."""
    no_feedback = np.eye(values.shape[1], dtype=np.float32)
    pieces = [values[at : at + ROWS] for at in range(0, len(values), ROWS)]
    made = side_by_side(lambda piece: _walk(piece, no_feedback, weights, form, feedback=False), pieces)
    codes, scales, biases = (np.concatenate(parts, -1) for parts in zip(*made, strict=True))
    return assemble(codes, scales, biases, form)


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with U^T U = H^-1, float64; H damped until it has an inverse."""
    hessian = hessian.astype(np.float64)
    diagonal = np.diag(hessian)
    mean = diagonal.mean() or 1.0
    hessian[np.diag_indices_from(hessian)] = np.where(diagonal > 0, diagonal, mean)
    while True:
        damped = hessian + np.eye(len(hessian)) * damping * mean
        try:
            return _triangles(damped[::-1, ::-1])[1][::-1, ::-1]
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


def _walk(
    piece: np.ndarray, upper: np.ndarray, weights: np.ndarray, form: Affine, feedback: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [R, I] -> codes [I, R], scales and biases [I / group, R]."""
    left = np.ascontiguousarray(piece.T)  # what is still to be rounded, [I, R]
    columns, size = len(left), form.group_size
    codes = np.empty(left.shape, np.uint8)
    scales, biases = np.empty((2, columns // size, left.shape[1]), np.float32)
    for g, at in enumerate(range(0, columns, size)):
        end = at + size
        scale, bias = fit(left[at:end], weights[at:end], form)
        scales[g], biases[g] = scale, bias
        if not feedback:
            codes[at:end] = encode(left[at:end], scale, bias, form.bits)
            continue
        errors = _round_group(left[at:end], upper[at:end, at:end], scale, bias, form.bits, codes[at:end])
        left[end:] -= upper[at:end, end:].T @ errors
    return codes, scales, biases


def _round_group(
    left: np.ndarray, upper: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int, codes: np.ndarray
) -> np.ndarray:
    """Columns [n, R] rounded in turn, each taking the error of those before; codes are filled in. -> scaled errors."""
    errors = np.empty_like(left)
    for j in range(len(left)):
        code = encode(left[j], scale, bias, bits)
        codes[j] = code
        errors[j] = (left[j] - decode(code, scale, bias)) / upper[j, j]
        left[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return errors
