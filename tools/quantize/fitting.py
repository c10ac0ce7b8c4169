"""Scale and zero point of a group, chosen by the error that they leave, column by column weighted.

Numbers come as columns first, [group, rows]: a rounding that walks through columns then walks through memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...schemes import pack
from ...tensors import Affine, Tensor, floats, store

SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)  # of the range from least to greatest: outliers may be clipped
REFITS = 2  # times that scale and bias are fitted anew to the codes they led to


def fit(group: np.ndarray, weights: np.ndarray, form: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases [rows], as `form` stores them, of group [n, rows]; weights [n]: what an error there costs.

    Ranges shrunk towards their weighted middle are tried, then scale and bias are fitted by least squares to the codes
    of the best and rounded again, as long as that helps.
    """
    steps = np.float32((1 << form.bits) - 1)
    weights = np.ascontiguousarray(weights, np.float32)
    low, high = group.min(0), group.max(0)
    best, scales, biases = np.full(low.shape, np.inf, np.float32), np.ones_like(low), np.zeros_like(low)
    for share in SHRUNK if form.bits < 8 else SHRUNK[:1]:
        cut = (1 - share) / 2 * (high - low)
        _keep_better(group, weights, (low + cut, high - cut), steps, form, (best, scales, biases))
    for _ in range(REFITS):
        codes = encode(group, scales, biases, form.bits)
        fresh = _least_squares(group, codes, weights)
        usable = fresh[0] > 0
        ends = np.where(usable, fresh[1], biases), np.where(usable, fresh[1] + steps * fresh[0], biases)
        _keep_better(group, weights, ends, steps, form, (best, scales, biases))
    return scales, biases


def _keep_better(
    group: np.ndarray, weights: np.ndarray, ends: tuple[np.ndarray, np.ndarray], steps: np.float32, form: Affine,
    kept: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:  # fmt: skip
    """Where a range from ends[0] to ends[1] leaves less error than what is kept, keep its scale and bias."""
    best, scales, biases = kept
    scale = stored(np.maximum((ends[1] - ends[0]) / steps, np.float32(1e-7)), form)
    bias = stored(ends[0], form)
    left = group - decode(encode(group, scale, bias, form.bits), scale, bias)
    error = weights @ np.square(left, out=left)
    better = error < best
    best[better], scales[better], biases[better] = error[better], scale[better], bias[better]


def _least_squares(group: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias that come nearest to the group with these codes; scale 0 where the codes are all the same."""
    total = weights.sum() or np.float32(1)
    mean_code, mean = weights @ codes / total, weights @ group / total
    centred = codes - mean_code
    spread = weights @ (centred * centred)
    scale = np.where(spread > 0, weights @ (centred * group) / np.where(spread > 0, spread, 1), 0)
    return scale.astype(np.float32), (mean - scale * mean_code).astype(np.float32)


def stored(values: np.ndarray, form: Affine) -> np.ndarray:
    """float32 values as they will be read back."""
    return floats(store(values, form.dtype), form.dtype)


def encode(values: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Codes as float32, of the shape of values."""
    codes = (values - biases) / scales
    return np.clip(np.rint(codes, out=codes), 0, (1 << bits) - 1, out=codes)


def decode(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    return codes * scales + biases


def assemble(codes: np.ndarray, scales: Sequence[np.ndarray], biases: Sequence[np.ndarray], form: Affine) -> Tensor:
    """codes [I, O] uint8, scales and biases [I / group][O] -> the tensor [O, I]."""
    parts = {"weight": pack(np.ascontiguousarray(codes.T), form.bits)}
    parts |= {"scales": store(np.stack(scales, 1), form.dtype), "biases": store(np.stack(biases, 1), form.dtype)}
    return Tensor((codes.shape[1], codes.shape[0]), form, parts)
