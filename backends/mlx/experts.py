"""Mixtures of experts on MLX: the election, and products gathered by expert."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..base import RouteRule, Routing
from .attention import plain

SORT_FROM = 64  # pairs of token and expert: from here on, reading each expert once pays for sorting

SCORES = {"softmax": lambda x: mx.softmax(x, axis=-1), "sigmoid": mx.sigmoid, "sparsemixer": lambda x: x}


class MlxRouting(Routing):
    """`order` sorts the flat (token, expert) pairs by expert, made on first use."""

    def __init__(self, ids: mx.array, gates: mx.array, rule: RouteRule):
        self.ids, self.gates, self.rule = ids, gates, rule
        self._sorted: tuple[mx.array, mx.array, mx.array] | None = None

    def sorted(self) -> tuple[mx.array, mx.array, mx.array]:
        """The pairs' order by expert, the experts in that order, and the way back."""
        if self._sorted is None:
            flat = self.ids.flatten()
            order = mx.argsort(flat)
            self._sorted = order, flat[order], mx.argsort(order)
        return self._sorted


class MlxExperts:
    """A mixin of MlxBackend."""

    def route(self, logits: mx.array, k: int, rule: RouteRule, bias: Any = None) -> MlxRouting:
        logits = plain(logits).astype(mx.float32)
        scores = SCORES[rule.scoring](logits)
        ballots = scores if bias is None else scores + self.weight(bias).numbers().astype(mx.float32)
        if rule.groups > 1:
            ballots = _best_groups(ballots, rule)
        ids = mx.stop_gradient(mx.argsort(-ballots, axis=-1)[:, :k].astype(mx.int32))
        if rule.scoring == "sparsemixer":
            gates = _rival_shares(logits, ids, rule.jitter)
        else:
            gates = mx.take_along_axis(scores, ids, axis=-1)
        if rule.renormalise:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        return MlxRouting(ids, gates if rule.scale == 1.0 else gates * rule.scale, rule)

    def expert_linear(self, x: mx.array, weight: Any, routing: MlxRouting, bias: Any = None) -> mx.array:
        x, w, (n, k) = plain(x), self.weight(weight), routing.ids.shape
        if routing.rule.gate_on_input and x.ndim == 2:
            x = x[:, None] * routing.gates[..., None].astype(x.dtype)
        if n * k >= SORT_FROM:
            y = _in_order(x, w, routing)
        else:
            rows = x[:, None, None] if x.ndim == 2 else x[:, :, None]
            y = w.gathered(rows, None, routing.ids, False).squeeze(-2)
        return y if bias is None else y + self.weight(bias).rows(routing.ids)

    def combine(self, y: mx.array, routing: MlxRouting) -> mx.array:
        y = plain(y)
        if routing.rule.gate_on_input:
            return y.sum(axis=1)
        return (y * routing.gates[..., None]).sum(axis=1).astype(y.dtype)


def _in_order(x: mx.array, w: Any, routing: MlxRouting) -> mx.array:
    """Every expert's tokens side by side, so that each is read once: x [N, I] or [N, k, I] -> [N, k, O]"""
    n, k = routing.ids.shape
    order, experts, back = routing.sorted()
    senders = order // k if x.ndim == 2 else order
    rows = x.reshape(-1, 1, x.shape[-1])[senders]
    y = w.gathered(rows, None, experts, True)
    return y.squeeze(-2)[back].reshape(n, k, -1)


def _rival_shares(logits: mx.array, ids: mx.array, jitter: float) -> mx.array:
    """The sparsemixer's gates (see RouteRule), [N, k]."""
    left, gates = logits, []
    for elected in mx.split(ids, ids.shape[1], axis=-1):
        best = mx.take_along_axis(logits, elected, axis=-1)
        near = best - left <= 2 * jitter * mx.maximum(mx.abs(logits), best)
        shares = mx.softmax(mx.where(near, left, -mx.inf), axis=-1)
        gates.append(mx.take_along_axis(shares, elected, axis=-1))
        left = mx.put_along_axis(left, elected, mx.array(-mx.inf), axis=-1)
    return mx.concatenate(gates, axis=-1)


def _best_groups(ballots: mx.array, rule: RouteRule) -> mx.array:
    """Only the experts of the best groups keep their scores; the others get -inf."""
    grouped = ballots.reshape(ballots.shape[0], rule.groups, -1)
    strength = mx.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    losers = mx.argsort(-strength, axis=-1)[:, rule.top_groups :]
    standing = mx.put_along_axis(mx.ones(strength.shape, mx.bool_), losers, mx.array(False), axis=-1)
    return mx.where(standing[..., None], grouped, -mx.inf).reshape(ballots.shape)
