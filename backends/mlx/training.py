"""What training needs, on MLX's own automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ... import noise
from .. import moments
from .attention import plain


class MlxTraining:
    """A mixin of MlxBackend."""

    def token_loss(self, logits: mx.array, targets: mx.array) -> mx.array:
        logits = plain(logits).astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if targets.ndim == 2:
            return -(mx.softmax(targets.astype(mx.float32), axis=-1) * logprobs).sum(axis=-1)
        picked = mx.take_along_axis(logprobs, mx.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return mx.where(targets >= 0, -picked, 0.0)

    def value_and_grad(self, fn: Callable) -> Callable:
        return mx.value_and_grad(fn)

    def remat(self, fn: Callable) -> Callable:
        """mx.checkpoint follows the arrays among its arguments; the others pass by it."""

        def rematerialised(params: Mapping[str, mx.array], *arrays: Any) -> mx.array:
            where = [i for i, a in enumerate(arrays) if isinstance(a, mx.array)]

            def run(params: Mapping[str, mx.array], *traced: mx.array) -> mx.array:
                given = list(arrays)
                for i, a in zip(where, traced, strict=True):
                    given[i] = a
                return plain(fn(params, *given))

            return mx.checkpoint(run)(params, *(arrays[i] for i in where))

        return lambda params, *arrays: rematerialised(params, *(plain(a) for a in arrays))

    def dropout(self, x: mx.array, rate: float, seed: int, step: int) -> mx.array:
        x = plain(x)
        kept = noise.uniform(seed, "dropout", step, x.shape) >= rate
        return x * mx.array(kept.astype(np.float32) / np.float32(1.0 - rate)).astype(x.dtype)

    def inverse_norm(self, weight: Any, down: mx.array, up: mx.array, scale: float) -> mx.array:
        adapted = self.dequantize(weight) + scale * (up.astype(mx.float32) @ down.astype(mx.float32))
        return mx.stop_gradient(mx.rsqrt(mx.square(adapted).sum(axis=-1)))

    def sum(self, x: mx.array) -> mx.array:
        return plain(x).astype(mx.float32).sum()

    def quantized(self, codes: np.ndarray, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
        return mx.dequantize(mx.array(codes), scales, biases, group_size=group_size, bits=bits)

    def adamw(
        self, params: Mapping[str, mx.array], grads: Mapping[str, mx.array], state: dict, step: int, rate: float,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0, bits: int = 32,
    ) -> tuple[dict[str, mx.array], dict[str, mx.array]]:  # fmt: skip
        fresh, kept = {}, {}
        for name, param in params.items():
            packed = moments.packed(param.size, bits)
            grad = grads[name].astype(mx.float32)
            m, v = _moments(state, name, param.shape, packed)
            m = betas[0] * m + (1 - betas[0]) * grad
            v = betas[1] * v + (1 - betas[1]) * mx.square(grad)
            moved = (m / (1 - betas[0] ** step)) / (mx.sqrt(v / (1 - betas[1] ** step)) + eps)
            new = param.astype(mx.float32) * (1 - rate * decay) - rate * moved
            fresh[name] = new.astype(param.dtype)
            values = (*_compress(m, True), *_compress(mx.sqrt(v), False)) if packed else (m, v)
            parts = moments.PACKED if packed else moments.PLAIN
            more = {f"{name}.{part}": a for part, a in zip(parts, values, strict=True)}
            if packed:
                mx.eval(fresh[name], more)  # now: the float32 moments of one array at a time
            kept |= more
        mx.eval(fresh, kept)
        return fresh, kept


def _moments(state: Mapping[str, mx.array], name: str, shape: tuple[int, ...], packed: bool) -> list[mx.array]:
    """The first and the second, float32."""
    if not state:
        return [mx.zeros(shape), mx.zeros(shape)]
    found = [state[f"{name}.{part}"] for part in (moments.PACKED if packed else moments.PLAIN)]
    return [_expand(*found[:2], shape, True), mx.square(_expand(*found[2:], shape, False))] if packed else found


def _compress(values: mx.array, signed: bool) -> tuple[mx.array, mx.array]:
    """`moments.compress`"""
    table = moments.code(7 if signed else 8)
    edges, starts = mx.array(table.edges), mx.array(table.starts)
    padding = moments.blocks(values.size) * moments.BLOCK - values.size
    rows = mx.pad(values.reshape(-1), (0, padding)).reshape(-1, moments.BLOCK)
    scales = mx.abs(rows).max(axis=1)
    share = mx.minimum(mx.abs(rows) * (1 / mx.where(scales == 0, 1.0, scales))[:, None], 1.0)
    found = starts[mx.view(share, mx.int32) >> moments.SHIFT]
    for _ in range(2):
        found = found + (share >= edges[found + 1])
    found = found + 128 * (rows < 0) if signed else found
    return mx.view(found.astype(mx.uint8).reshape(-1), mx.int32), scales


def _expand(codes: mx.array, scales: mx.array, shape: tuple[int, ...], signed: bool) -> mx.array:
    """`moments.expand`"""
    levels = mx.array(moments.levels(signed))
    values = levels[mx.view(codes, mx.uint8)].reshape(-1, moments.BLOCK) * scales[:, None]
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)
