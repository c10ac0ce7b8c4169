"""Small functions on ndarrays that the reference's operations and their derivatives share."""

from __future__ import annotations

from collections.abc import Callable
from math import erf, pi, sqrt

import numpy as np

from ..errors import Unsupported
from ..registry import did_you_mean
from .base import AttentionSpec


def to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [..., n] as a cache keeps them in int8: codes [..., n] and scales [..., 1] float32."""
    scales = np.abs(x).max(axis=-1, keepdims=True, initial=0).astype(np.float32) / np.float32(127)
    sound = (scales > 0) & np.isfinite(scales)  # otherwise the scale says it
    return np.rint(np.where(sound, x, 0) / np.where(sound, scales, 1)).astype(np.int8), scales


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * x) + 0.5  # never overflows


def _normal_share(x: np.ndarray) -> np.ndarray:
    """The normal distribution's share below x. NumPy has no erf and no short formula reaches float64, so the C
    library's is mapped over the numbers."""
    return np.array([0.5 + 0.5 * erf(v / sqrt(2)) for v in x.ravel().tolist()], x.dtype).reshape(x.shape)


def _silu_slope(x: np.ndarray) -> np.ndarray:
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_slope(x: np.ndarray) -> np.ndarray:
    return _normal_share(x) + x * np.exp(-0.5 * x * x) * (1 / sqrt(2 * pi))


def _gelu_tanh_inner(x: np.ndarray) -> np.ndarray:
    return np.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x))


def _gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    t = _gelu_tanh_inner(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x)


def _clamped_swish(x: np.ndarray) -> np.ndarray:
    x = np.minimum(x, 7)
    return x * sigmoid(1.702 * x)


def _clamped_swish_slope(x: np.ndarray) -> np.ndarray:
    s = sigmoid(1.702 * x)
    return np.where(x < 7, s * (1 + 1.702 * x * (1 - s)), 0).astype(x.dtype, copy=False)


Function = Callable[[np.ndarray], np.ndarray]
ACTIVATIONS: dict[str, tuple[Function, Function]] = {  # each with its derivative
    "silu": (lambda x: x * sigmoid(x), _silu_slope),
    "gelu": (lambda x: x * _normal_share(x), _gelu_slope),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + _gelu_tanh_inner(x)), _gelu_tanh_slope),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
    "relu2": (lambda x: np.square(np.maximum(x, 0)), lambda x: 2 * np.maximum(x, 0)),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "tanh": (np.tanh, lambda x: 1 - np.square(np.tanh(x))),
    "clamp": (lambda x: np.clip(x, -7, 7), lambda x: (np.abs(x) < 7).astype(x.dtype)),
    "clamped_swish": (_clamped_swish, _clamped_swish_slope),
}


def activation(kind: str) -> tuple[Function, Function]:
    """A function and its derivative. Raises Unsupported for an unknown name."""
    if kind not in ACTIVATIONS:
        raise Unsupported(f"There is no activation named {kind!r}.", did_you_mean(kind, ACTIVATIONS))
    return ACTIVATIONS[kind]


def gains(gain: np.ndarray | None, x: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """By what a norm of x [..., D] multiplies (see Backend.rms_norm): [D], or [H, D] where every head has its own."""
    if gain is None:
        return np.ones(x.shape[-1], x.dtype)
    gain = gain + x.dtype.type(offset)
    return gain if gain.size == x.shape[-1] else gain.reshape(-1, x.shape[-1])


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; a row of nothing but -inf gives zeros."""
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax_pull(grad: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """From the gradient of softmax's result, and the result, to that of its input."""
    return weights * (grad - (grad * weights).sum(axis=-1, keepdims=True))


def rival_shares(logits: np.ndarray, ids: np.ndarray, jitter: float) -> np.ndarray:
    """The sparsemixer's shares of all experts (see RouteRule) as each of `ids` [N, k] is elected, [N, k, E]."""
    left, shares = logits.copy(), np.empty((*ids.shape, logits.shape[-1]), logits.dtype)
    for i, elected in enumerate(ids.T[..., None]):
        best = np.take_along_axis(logits, elected, axis=-1)
        near = best - left <= 2 * jitter * np.maximum(np.abs(logits), best)
        shares[:, i] = softmax(np.where(near, left, -np.inf))
        np.put_along_axis(left, elected, -np.inf, axis=-1)
    return shares


def rotate(x: np.ndarray, angles: np.ndarray, interleaved: bool, scale: float) -> np.ndarray:
    """x [B, T, H, d] turned by angles [B, T, r / 2] (see Backend.rope)."""
    half = angles.shape[-1]
    cos, sin = np.cos(angles)[:, :, None] * scale, np.sin(angles)[:, :, None] * scale
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    first, second = (x[..., pair] for pair in pairs)
    out = x.copy()
    out[..., pairs[0]] = first * cos - second * sin
    out[..., pairs[1]] = second * cos + first * sin
    return out


def visible(
    queries: np.ndarray, keys: np.ndarray, spec: AttentionSpec, segments: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Which key positions [S] each query position [T] sees: bool [T, S]. segments: those of queries and keys."""
    i, j = queries[:, None], keys[None, :]
    seen = j <= i
    if spec.window is not None:
        seen &= i - j < spec.window
    if spec.chunk is not None:
        seen &= i // spec.chunk == j // spec.chunk
    if segments is not None:
        seen &= segments[0][:, None] == segments[1][None, :]
    return seen


def expert_inputs(x: np.ndarray, gates: np.ndarray | None, ids: np.ndarray) -> np.ndarray:
    """x [N, I] or [N, k, I] -> what each token sends to each of its experts, [N, k, I]"""
    if x.ndim == 2:
        x = np.broadcast_to(x[:, None], (*ids.shape, x.shape[-1]))
    return x if gates is None else x * gates[..., None]


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of something of `shape` that was broadcast to the gradient's shape: itself, where nothing was."""
    if grad.shape == shape:
        return grad
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 != grad.shape[i]), keepdims=True)
