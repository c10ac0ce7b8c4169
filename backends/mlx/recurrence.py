"""Mixers with a state on MLX: short convolution and gated delta rule, in float32, differentiable."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..base import Step
from ..recurrence import TINY
from .attention import plain


class MlxRecurrence:
    """A mixin of MlxBackend."""

    def short_convolution(self, x: Any, weight: Any, bias: Any, step: Step, layer: int) -> mx.array:
        x, w = plain(x), self.dequantize(weight)
        (rows, tokens, channels), back = x.shape, w.shape[1] - 1
        before = self._state(step, layer, tokens, 0)
        if before is None:
            before = mx.zeros((rows, back, channels))
        padded = mx.concatenate([before, x.astype(mx.float32)], axis=1)
        y = mx.zeros(x.shape) if bias is None else self.dequantize(bias)
        for j in range(back + 1):
            tap = padded[:, j : j + tokens] * w[:, j]
            y = y + (tap if step.segments is None else tap * _same_document(step.segments, back - j))
        if step.cache is not None:
            last = mx.array(step.lengths[:, None] + np.arange(back, dtype=np.int32))  # of the real tokens
            self._keep(step, layer, 0, mx.take_along_axis(padded, last[:, :, None], axis=1))
        return y.astype(x.dtype)

    def gated_delta(
        self, q: Any, k: Any, v: Any, a: Any, b: Any, rate: Any, shift: Any, step: Step, layer: int
    ) -> mx.array:
        q, k, v, a, b = (plain(x).astype(mx.float32) for x in (q, k, v, a, b))
        (rows, tokens, heads, dv), dk = v.shape, q.shape[-1]
        q, k = (mx.repeat(_unit(x), heads // x.shape[2], axis=2) for x in (q, k))
        q = q * dk**-0.5
        keep = mx.exp(-mx.exp(self.dequantize(rate)) * mx.logaddexp(a + self.dequantize(shift), mx.array(0.0)))
        learn = mx.sigmoid(b)
        if (step.lengths < tokens).any():
            real = mx.array(np.arange(tokens) < step.lengths[:, None])[:, :, None]
            keep, learn = mx.where(real, keep, 1.0), mx.where(real, learn, 0.0)
        if step.segments is not None:
            keep = keep * _same_document(step.segments, 1)
        memory = self._state(step, layer, tokens, 1)
        if memory is None:
            memory = mx.zeros((rows, heads, dk, dv))
        read = []
        for t in range(tokens):
            memory = memory * keep[:, t, :, None, None]
            lacking = v[:, t] - (k[:, t, :, None] @ memory)[:, :, 0]
            memory = memory + k[:, t, :, :, None] * (lacking * learn[:, t, :, None])[:, :, None]
            read.append((q[:, t, :, None] @ memory)[:, :, 0])
        if step.cache is not None:
            self._keep(step, layer, 1, memory)
        return mx.stack(read, axis=1).astype(self.dtype)

    def _state(self, step: Step, layer: int, tokens: int, part: int) -> mx.array | None:
        """A layer's state before the step, by row; None without a cache."""
        if step.cache is None:
            return None
        self._where(step, tokens).check(step.cache.capacity)
        found = step.cache.states[layer][part][mx.array(step.slots)]
        if (step.starts > 0).all():
            return found
        return found * mx.array(step.starts > 0).reshape(-1, *[1] * (found.ndim - 1))

    def _keep(self, step: Step, layer: int, part: int, new: mx.array) -> None:
        states = step.cache.states[layer]
        states[part][mx.array(step.slots)] = new


def _same_document(segments: np.ndarray, back: int) -> mx.array:
    """segments [B, T] -> [B, T, 1]: 1 where the token `back` places earlier is of the same document; places before the
    row count as same."""
    same = np.ones(segments.shape, np.float32)
    same[:, back:] = segments[:, back:] == segments[:, : max(segments.shape[1] - back, 0)]
    return mx.array(same)[:, :, None]


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + TINY)
