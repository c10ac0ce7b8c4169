"""Scale and zero point of a group, chosen by the error that they leave, column by column weighted.

Numbers come as columns first, [group, rows]: a rounding that walks through columns then walks through memory. Several
groups may come at once, [groups, group, rows].
"""

from __future__ import annotations

import numpy as np

from ...schemes import pack
from ...tensors import Affine, Tensor, floats, store

SHRUNK = (1.0, 0.85, 0.7)  # of the range from least to greatest: outliers may be clipped
MOVES = (0.08, 0.04)  # of the range, by which its ends are then moved in and out
FINE = 6  # bits from which on the whole range is best
LEAST = np.float32(1e-7)  # of a scale: a group of one value has no range
REFITS = 2  # times that scale and bias are at last fitted anew to the codes they led to


def fit(group: np.ndarray, weights: np.ndarray, form: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases [..., rows], as `form` stores them, of group [..., n, rows]; weights [..., n]: what an error
    there costs.

    Shrunk ranges are tried, then each end of the best is moved, and in between and at last scale and bias are fitted by
    least squares to the codes that they led to; whatever helps is kept. Within a few per cent of the best there is.
    """
    kept = _Kept(group, weights, form)
    low, high = group.min(-2), group.max(-2)
    span = high - low
    for share in SHRUNK if form.bits < FINE else SHRUNK[:1]:
        cut = (1 - share) / 2 * span
        kept.offer(low + cut, high - cut)
    for move in MOVES if form.bits < FINE else ():
        kept.refit()
        for step in (-move * span, move * span):
            kept.offer(kept.biases + step, kept.top())
        for step in (-move * span, move * span):
            kept.offer(kept.biases.copy(), kept.top() + step)
    for _ in range(REFITS):
        kept.refit()
    return kept.scales, kept.biases


class _Kept:
    """The scale and bias of least error so far, by row."""

    def __init__(self, group: np.ndarray, weights: np.ndarray, form: Affine):
        self.group, self.form = group, form
        self.weights = np.ascontiguousarray(weights, np.float32)[..., None, :]
        self.steps = np.float32((1 << form.bits) - 1)
        shape = (*group.shape[:-2], group.shape[-1])
        self.error = np.full(shape, np.inf, np.float32)
        self.scales, self.biases = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        self.room = np.empty_like(group)  # for what is made of the group, over and over
        self.mean: np.ndarray | None = None

    def weighted(self, values: np.ndarray) -> np.ndarray:
        """The weighted sum over a group, [..., n, rows] -> [..., rows]."""
        return (self.weights @ values)[..., 0, :]

    def top(self) -> np.ndarray:
        """The value of the last code."""
        return self.biases + self.steps * self.scales

    def offer(self, low: np.ndarray, high: np.ndarray) -> None:
        """Where a range from low to high leaves less error than what is kept, it is kept instead."""
        scale = stored(np.maximum((high - low) / self.steps, LEAST), self.form)
        bias = stored(low, self.form)
        left = decode(encode(self.group, scale, bias, self.form.bits, self.room), scale, bias, self.room)
        np.subtract(self.group, left, out=left)
        error = self.weighted(np.square(left, out=left))
        better = error < self.error
        self.error[better], self.scales[better], self.biases[better] = error[better], scale[better], bias[better]

    def refit(self) -> None:
        """Offers the scale and bias that come nearest to the group with the codes they have led to."""
        codes = encode(self.group, self.scales, self.biases, self.form.bits, self.room)
        total = self.weights.sum(-1)
        total = np.where(total > 0, total, np.float32(1))
        mean_code = self.weighted(codes) / total
        if self.mean is None:
            self.mean = self.weighted(self.group) / total
        centred = np.subtract(codes, mean_code[..., None, :], out=codes)
        both = self.weighted(centred * self.group)
        spread = self.weighted(np.square(centred, out=centred))
        some = spread > 0  # else all codes are the same, and say nothing of a scale
        scale = np.where(some, both / np.where(some, spread, 1), self.scales)
        bias = np.where(some, self.mean - scale * mean_code, self.biases)
        self.offer(bias, bias + self.steps * scale)


def stored(values: np.ndarray, form: Affine) -> np.ndarray:
    """float32 values as they will be read back."""
    return floats(store(values, form.dtype), form.dtype)


def encode(
    values: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Codes as float32, of the shape of values [..., n, rows]; scales and biases [..., rows]."""
    codes = np.subtract(values, biases[..., None, :], out=out)
    codes /= scales[..., None, :]
    return np.clip(np.rint(codes, out=codes), 0, (1 << bits) - 1, out=codes)


def decode(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """What codes [..., n, rows] stand for."""
    values = np.multiply(codes, scales[..., None, :], out=out)
    values += biases[..., None, :]
    return values


def assemble(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, form: Affine) -> Tensor:
    """codes [I, O] uint8, scales and biases [I / group, O] -> the tensor [O, I]."""
    parts = {"weight": pack(np.ascontiguousarray(codes.T), form.bits)}
    parts |= {
        name: store(np.ascontiguousarray(a.T), form.dtype) for name, a in (("scales", scales), ("biases", biases))
    }
    return Tensor((codes.shape[1], codes.shape[0]), form, parts)
