"""Mixers that keep a state of fixed size instead of keys and values, in plain NumPy, with their derivatives.

A row that starts at position 0 starts from nothing, whatever its slot holds: resetting a slot costs no writing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Step
from .numerics import sigmoid

Gradients = tuple[np.ndarray | None, ...]
TINY = 1e-6  # under the root when queries and keys are made unit vectors, as models were trained with


class NumpyRecurrence:
    """A mixin of NumpyKernels."""

    # ---- short convolution

    def short_convolution(self, x: np.ndarray, weight: Any, bias: Any, step: Step, layer: int) -> np.ndarray:
        w, b = self.values(weight), self.values(bias)
        out = np.zeros(x.shape, x.dtype)
        for row, n in enumerate(step.lengths.tolist()):
            state = _state(step, layer, row)
            padded = np.concatenate([_before(state, step, row, w, x.dtype), x[row, :n]])
            for j, back in _taps(w):
                out[row, :n] += padded[j : j + n] * w[:, j] * _same_document(step, row, n, back, x.dtype)
            if state is not None and n:
                state.conv[...] = padded[n:]
        return out if b is None else out + b

    def short_convolution_vjp(
        self, grad: np.ndarray, need: tuple, x: np.ndarray, weight: Any, bias: Any, step: Step, layer: int
    ) -> Gradients:
        w = self.values(weight)
        to_x, to_w, to_b = np.zeros_like(x), np.zeros_like(w), np.zeros(len(w), x.dtype)
        for row, n in enumerate(step.lengths.tolist()):
            to_b += grad[row, :n].sum(axis=0)
            for j, back in _taps(w):
                arriving = (grad[row, :n] * _same_document(step, row, n, back, x.dtype))[back:]
                to_x[row, : max(n - back, 0)] += arriving * w[:, j]
                to_w[:, j] += (arriving * x[row, : max(n - back, 0)]).sum(axis=0)
        return to_x, to_w, to_b

    # ---- gated delta rule

    def gated_delta(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray, rate: Any, shift: Any,
        step: Step, layer: int,
    ) -> np.ndarray:  # fmt: skip
        q, k, keep, learn = self._delta_inputs(q, k, v, a, b, rate, shift)
        out = np.zeros(v.shape, v.dtype)
        for row, n in enumerate(step.lengths.tolist()):
            state = _state(step, layer, row)
            memory = np.zeros((v.shape[2], q.shape[-1], v.shape[-1]), v.dtype)
            if state is not None and step.starts[row] > 0:
                memory[...] = state.memory
            for t in range(n):
                if _begins(step, row, t):
                    memory = np.zeros_like(memory)
                memory, out[row, t] = _delta(memory, q[row, t], k[row, t], v[row, t], keep[row, t], learn[row, t])[:2]
            if state is not None and n:
                state.memory[...] = memory
        return out

    def _delta_inputs(self, q, k, v, a, b, rate, shift) -> tuple[np.ndarray, ...]:
        """Unit queries (scaled) and keys for every head of v, [B, T, H, dk]; what a step keeps and how much it learns,
        [B, T, H]."""
        group = v.shape[2] // q.shape[2]
        q, k = (np.repeat(_unit(x), group, axis=2) for x in (q, k))
        keep = np.exp(-np.exp(self.values(rate)) * np.logaddexp(a + self.values(shift), 0)).astype(v.dtype)
        return q * q.dtype.type(q.shape[-1] ** -0.5), k, keep, sigmoid(b)

    def gated_delta_vjp(
        self, grad: np.ndarray, need: tuple, q: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray,
        b: np.ndarray, rate: Any, shift: Any, step: Step, layer: int,
    ) -> Gradients:  # fmt: skip
        units, keys, keep, learn = self._delta_inputs(q, k, v, a, b, rate, shift)
        to_q, to_k, to_v = np.zeros_like(units), np.zeros_like(keys), np.zeros_like(v)
        to_keep, to_learn = np.zeros_like(keep), np.zeros_like(learn)
        for row, n in enumerate(step.lengths.tolist()):
            inputs = (units[row], keys[row], v[row], keep[row], learn[row])
            results = (to_q[row], to_k[row], to_v[row], to_keep[row], to_learn[row])
            _delta_backwards(grad[row], inputs, results, [_begins(step, row, t) for t in range(n)])
        r, shifted = np.exp(self.values(rate)), a + self.values(shift)
        to_log_keep = to_keep * keep
        to_shifted = -to_log_keep * r * sigmoid(shifted)
        to_rate = (-to_log_keep * r * np.logaddexp(shifted, 0)).sum(axis=(0, 1))
        group, scale = v.shape[2] // q.shape[2], q.shape[-1] ** -0.5
        to_b = to_learn * learn * (1 - learn)
        to_q, to_k = _unit_pull(_gathered(to_q * scale, group), q), _unit_pull(_gathered(to_k, group), k)
        return to_q, to_k, to_v, to_shifted, to_b, to_rate, to_shifted.sum(axis=(0, 1))


# ------------------------------------------------------------------------------------------------ convolution's parts


def _state(step: Step, layer: int, row: int) -> Any:
    """Where a row's state is kept, None without a cache. Raises ContextFull before anything is written."""
    if step.cache is None:
        return None
    step.cache.check(step)
    return step.cache.states[layer].slot(int(step.slots[row]))


def _before(state: Any, step: Step, row: int, w: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inputs just before a row's first, [taps - 1, C]"""
    if state is None or step.starts[row] == 0:
        return np.zeros((w.shape[1] - 1, len(w)), dtype)
    return state.conv.astype(dtype)


def _taps(w: np.ndarray) -> list[tuple[int, int]]:
    """(column of the weight, how many tokens back it looks)"""
    return [(j, w.shape[1] - 1 - j) for j in range(w.shape[1])]


def _same_document(step: Step, row: int, n: int, back: int, dtype: np.dtype) -> np.ndarray | float:
    """[n, 1]: 1 where the token `back` places earlier is of the same document. Places before the row count as same."""
    if step.segments is None or back == 0:
        return 1.0
    document = step.segments[row, :n]
    same = np.ones((n, 1), dtype)
    same[back:, 0] = document[back:] == document[: max(n - back, 0)]
    return same


# ------------------------------------------------------------------------------------------------ delta rule's parts


def _begins(step: Step, row: int, t: int) -> bool:
    """Whether another document begins at the row's token t."""
    return step.segments is not None and t > 0 and step.segments[row, t] != step.segments[row, t - 1]


def _delta(memory, q, k, v, keep, learn) -> tuple[np.ndarray, ...]:
    """One token: memory [H, dk, dv] -> the next, what is read [H, dv], the memory after forgetting, what it lacked."""
    kept = memory * keep[:, None, None]
    lacking = v - np.einsum("hkv,hk->hv", kept, k)
    memory = kept + k[:, :, None] * (lacking * learn[:, None])[:, None]
    return memory, np.einsum("hkv,hk->hv", memory, q), kept, lacking


def _delta_backwards(grad: np.ndarray, inputs: tuple, results: tuple, begins: list[bool]) -> None:
    """One row, from its last token to its first; every memory is kept from a first pass forwards."""
    q, k, v, keep, learn = inputs
    to_q, to_k, to_v, to_keep, to_learn = results
    memory = np.zeros((v.shape[1], q.shape[-1], v.shape[-1]), v.dtype)
    passed = []
    for t, fresh in enumerate(begins):
        before = np.zeros_like(memory) if fresh else memory
        memory, _, kept, lacking = _delta(before, q[t], k[t], v[t], keep[t], learn[t])
        passed.append((before, memory, kept, lacking))
    to_memory = np.zeros_like(memory)
    for t in range(len(begins) - 1, -1, -1):
        before, memory, kept, lacking = passed[t]
        to_memory = to_memory + q[t][:, :, None] * grad[t][:, None]
        to_q[t] = np.einsum("hkv,hv->hk", memory, grad[t])
        to_learned = np.einsum("hkv,hk->hv", to_memory, k[t])  # of lacking * learn
        to_learn[t] = (to_learned * lacking).sum(axis=-1)
        to_v[t] = to_learned * learn[t][:, None]
        to_k[t] = np.einsum("hkv,hv->hk", to_memory, lacking * learn[t][:, None])
        to_k[t] -= np.einsum("hkv,hv->hk", kept, to_v[t])
        to_memory = to_memory - k[t][:, :, None] * to_v[t][:, None]  # now of `kept`
        to_keep[t] = (to_memory * before).sum(axis=(1, 2))
        to_memory = np.zeros_like(to_memory) if begins[t] else to_memory * keep[t][:, None, None]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + x.dtype.type(TINY))


def _unit_pull(grad: np.ndarray, x: np.ndarray) -> np.ndarray:
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True) + x.dtype.type(TINY))
    return (grad - x * (grad * x).sum(axis=-1, keepdims=True) / length**2) / length


def _gathered(grad: np.ndarray, group: int) -> np.ndarray:
    """Gradients [B, T, H, d] of repeated heads, summed up for the heads that were repeated."""
    return grad.reshape(*grad.shape[:2], -1, group, grad.shape[-1]).sum(axis=3)
