"""The derivative of every trainable operation of `reference.NumpyKernels`, in plain NumPy.

`op_vjp(grad, need, *inputs, *rest)` gets the gradient of the operation's result and what the operation got, and
returns a gradient for each of the inputs; None where `need` doesn't ask for one. What the forward pass computed is
computed again rather than kept: memory is scarcer than time on the machines this is for.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..errors import Unsupported
from .base import AttentionSpec, RouteRule, Step
from .numerics import (
    activation,
    expert_inputs,
    log_softmax,
    rival_shares,
    rotate,
    sigmoid,
    softmax,
    softmax_pull,
    unbroadcast,
)

Need = tuple[bool, ...]
Gradients = tuple[np.ndarray | None, ...]


class NumpyGradients:
    """A mixin of NumpyKernels."""

    # By operation: which of its inputs' numbers the gradient of each input reads. The tape lets go of the others; of
    # operations that are not listed it keeps all.
    READS: ClassVar[dict[str, tuple[tuple[int, ...], ...]]] = {
        "add": ((), ()),
        "mul": ((1,), (0,)),
        "reshape": ((),),
        "sum": ((),),
        "take": ((),),
        "piece": ((),),
        "embed": ((),),
        "linear": ((1,), (0,), ()),
        "adapted_linear": ((1, 3, 4), (0,), (), (0, 4), (0, 3)),
        "rope": ((),),
        "dropout": ((),),
    }

    def accumulate(self, into: np.ndarray, more: np.ndarray) -> None:
        np.add(into, more, out=into)

    # ---- arithmetic and views

    def add_vjp(self, grad: np.ndarray, need: Need, a: np.ndarray, b: np.ndarray | float) -> Gradients:
        return unbroadcast(grad, np.shape(a)), unbroadcast(grad, np.shape(b)) if need[1] else None

    def mul_vjp(self, grad: np.ndarray, need: Need, a: np.ndarray, b: np.ndarray | float) -> Gradients:
        to_a = unbroadcast(grad * b, np.shape(a)) if need[0] else None
        return to_a, unbroadcast(grad * a, np.shape(b)) if need[1] else None

    def reshape_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, shape: tuple[int, ...]) -> Gradients:
        return (grad.reshape(x.shape),)

    def sum_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray) -> Gradients:
        return (np.broadcast_to(grad, x.shape),)

    def take_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, rows: np.ndarray) -> Gradients:
        return (_scatter(grad, rows, x.shape),)

    def piece_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, start: int, end: int) -> Gradients:
        out = np.zeros(x.shape, grad.dtype)
        out[..., start:end] = grad
        return (out,)

    # ---- linear maps

    def embed_vjp(self, grad: np.ndarray, need: Need, weight: np.ndarray, ids: np.ndarray) -> Gradients:
        return (_scatter(grad, ids, weight.shape),)

    def linear_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, weight: Any, bias: Any) -> Gradients:
        w = self.values(weight)
        rows = grad.reshape(-1, w.shape[0])
        return (
            (rows @ w).reshape(*grad.shape[:-1], w.shape[1]) if need[0] else None,
            rows.T @ x.reshape(-1, w.shape[1]) if need[1] else None,
            rows.sum(axis=0) if need[2] else None,
        )

    def adapted_linear_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, weight: Any, bias: Any, down: Any, up: Any, scale: float
    ) -> Gradients:
        to_x, to_weight, to_bias = self.linear_vjp(grad, need[:3], x, weight, bias)
        low = self.linear(x, down) if need[4] else None
        to_low, to_up, _ = self.linear_vjp(grad * scale, (need[0] or need[3], need[4], False), low, up, None)
        through, to_down, _ = self.linear_vjp(to_low, (need[0], need[3], False), x, down, None)
        return to_x + through if need[0] else None, to_weight, to_bias, to_down, to_up

    # ---- norms and functions of one number

    def rms_norm_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, gain: Any, eps: float, offset: float
    ) -> Gradients:
        inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        return _norm_pull(grad, x * inverse, inverse, self.gains(gain, x, offset), centred=False)[:2]

    def layer_norm_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, gain: Any, bias: Any, eps: float
    ) -> Gradients:
        middle = x - x.mean(axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(np.mean(middle * middle, axis=-1, keepdims=True) + eps)
        return _norm_pull(grad, middle * inverse, inverse, self.gains(gain, x), centred=True)

    def act_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, kind: str) -> Gradients:
        return (grad * activation(kind)[1](x),)

    def gated_vjp(self, grad: np.ndarray, need: Need, gate: np.ndarray, up: np.ndarray, kind: str) -> Gradients:
        function, slope = activation(kind)
        return grad * up * slope(gate), grad * function(gate)

    def softcap_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, cap: float) -> Gradients:
        return (grad * (1 - np.square(np.tanh(x / cap))),)

    # ---- positions and attention

    def rope_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, step: Step, freqs: np.ndarray, interleaved: bool,
        scale: float,
    ) -> Gradients:  # fmt: skip
        return (rotate(grad, -self.angles(step, x.shape[1], freqs), interleaved, scale),)

    def attention_vjp(
        self, grad: np.ndarray, need: Need, q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: Any,
        spec: AttentionSpec, step: Step, layer: int,
    ) -> Gradients:  # fmt: skip
        if step.cache is not None:
            raise Unsupported("A cache can't be trained through.", "Use a Step without a cache in training.")
        to_q, to_k, to_v = (np.zeros(x.shape, grad.dtype) for x in (q, k, v))
        sink = self.values(sinks)
        to_sinks = None if sink is None else np.zeros(sink.shape, grad.dtype)
        group = q.shape[2] // k.shape[2]
        for row, n in enumerate(step.lengths.tolist()):
            seen = self.context(k, v, spec, step, layer, row)[2]
            for h in range(q.shape[2]):
                at, kv = (row, slice(n), h), (row, slice(n), h // group)
                one = None if sink is None else sink[h]
                pulled = self._head_pull(grad[at], q[at], k[kv], v[kv], one, seen, spec)
                to_q[at] = pulled[0]
                to_k[kv] += pulled[1]
                to_v[kv] += pulled[2]
                if to_sinks is not None:
                    to_sinks[h] += pulled[3]
        return to_q, to_k, to_v, to_sinks

    def _head_pull(
        self, grad: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: float | None, seen: np.ndarray,
        spec: AttentionSpec,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:  # fmt: skip
        """One head of one row: gradients of q, k, v and the sink's score."""
        weights = self.weights(q, k, sink, seen, spec)
        to_weights = grad @ v.T
        shared = (to_weights * weights).sum(axis=-1, keepdims=True)
        to_scores = weights * (to_weights - shared)
        to_sink = -float(((1 - weights.sum(axis=-1, keepdims=True)) * shared).sum())
        if spec.softcap is not None:
            to_scores = to_scores * (1 - np.square(np.tanh(q @ k.T * (spec.scale / spec.softcap))))
        to_scores = to_scores * spec.scale
        return to_scores @ k, to_scores.T @ q, weights.T @ grad, to_sink

    def latent_attention_vjp(
        self, grad: np.ndarray, need: Need, q_nope: np.ndarray, q_rope: np.ndarray, c: np.ndarray, k_rope: np.ndarray,
        wk: Any, wv: Any, spec: AttentionSpec, step: Step, layer: int,
    ) -> Gradients:  # fmt: skip
        wk, wv, latent = self.values(wk), self.values(wv), c[:, :, None]
        q, k = self.absorbed(q_nope, q_rope, c, k_rope, wk)
        mixed = self.attention(q, k, latent, None, spec, step, layer)
        to_mixed = np.einsum("bthv,hvl->bthl", grad, wv)
        every = (True, True, True, False)
        to_q, to_k, to_latent, _ = self.attention_vjp(to_mixed, every, q, k, latent, None, spec, step, layer)
        to_absorbed, to_q_rope = np.split(to_q, [c.shape[-1]], axis=-1)
        to_c, to_k_rope = np.split(to_k[:, :, 0], [c.shape[-1]], axis=-1)
        return (
            np.einsum("bthl,hnl->bthn", to_absorbed, wk),
            to_q_rope,
            to_c + to_latent[:, :, 0],
            to_k_rope,
            np.einsum("bthn,bthl->hnl", q_nope, to_absorbed) if need[4] else None,
            np.einsum("bthv,bthl->hvl", grad, mixed) if need[5] else None,
        )

    # ---- experts

    def gates_vjp(
        self, grad: np.ndarray, need: Need, logits: np.ndarray, ids: np.ndarray, rule: RouteRule
    ) -> Gradients:
        rivals = rule.scoring == "sparsemixer"
        scores = rival_shares(logits, ids, rule.jitter) if rivals else self.scores(logits, rule)
        ids = ids[..., None] if rivals else ids
        chosen = np.take_along_axis(scores, ids, axis=-1).reshape(grad.shape)
        to_chosen = grad * rule.scale
        if rule.renormalise:
            total = chosen.sum(axis=-1, keepdims=True)
            to_chosen = (to_chosen - (to_chosen * chosen).sum(axis=-1, keepdims=True) / total) / total
        to_scores = np.zeros(scores.shape, grad.dtype)
        np.put_along_axis(to_scores, ids, to_chosen.reshape(ids.shape), axis=-1)
        if rivals:
            return (softmax_pull(to_scores, scores).sum(axis=1),)
        softmaxed = rule.scoring == "softmax"
        return (softmax_pull(to_scores, scores) if softmaxed else to_scores * scores * sigmoid(-logits),)

    def expert_linear_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, weight: Any, bias: Any, gates: np.ndarray | None,
        ids: np.ndarray,
    ) -> Gradients:  # fmt: skip
        w, inputs = self.values(weight), expert_inputs(x, gates, ids)
        to_inputs = np.zeros(inputs.shape, grad.dtype)
        to_weight = np.zeros(w.shape, grad.dtype) if need[1] else None
        to_bias = np.zeros(w.shape[:2], grad.dtype) if need[2] else None
        for expert in np.unique(ids):
            chosen = ids == expert
            to_inputs[chosen] = grad[chosen] @ w[expert]
            if need[1]:
                to_weight[expert] = grad[chosen].T @ inputs[chosen]
            if need[2]:
                to_bias[expert] = grad[chosen].sum(axis=0)
        to_gates = (to_inputs * expert_inputs(x, None, ids)).sum(axis=-1) if need[3] else None
        to_x = to_inputs if gates is None else to_inputs * gates[..., None]
        return to_x.sum(axis=1) if x.ndim == 2 else to_x, to_weight, to_bias, to_gates

    def combine_vjp(self, grad: np.ndarray, need: Need, y: np.ndarray, gates: np.ndarray | None) -> Gradients:
        each = np.broadcast_to(grad[:, None], y.shape)
        return each if gates is None else each * gates[..., None], (each * y).sum(axis=-1) if need[1] else None

    # ---- training

    def token_loss_vjp(self, grad: np.ndarray, need: Need, logits: np.ndarray, targets: np.ndarray) -> Gradients:
        weights = np.exp(log_softmax(logits))
        if targets.ndim == 2:
            return ((weights - softmax(targets)) * grad[:, None],)
        counted = np.flatnonzero(targets >= 0)
        out = np.zeros(logits.shape, grad.dtype)
        out[counted] = weights[counted]
        out[counted, targets[counted]] -= 1
        return (out * grad[:, None],)

    def dropout_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, rate: float, seed: int, step: int) -> Gradients:
        return (grad * self.kept(x.shape, rate, seed, step),)

    def affine_vjp(
        self, grad: np.ndarray, need: Need, scales: np.ndarray, biases: np.ndarray, codes: np.ndarray, bits: int,
        group_size: int,
    ) -> Gradients:  # fmt: skip
        grouped = grad.reshape(*scales.shape, group_size)
        return (grouped * self.codes(codes, scales, bits, group_size)).sum(axis=-1), grouped.sum(axis=-1)


def _scatter(grad: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros of `shape`, with each of grad's rows added where it was taken from."""
    out = np.zeros(shape, grad.dtype)
    if rows.ndim == 1 and len(np.unique(rows)) == len(rows):
        out[rows] = grad
    else:
        np.add.at(out, rows, grad)
    return out


def _norm_pull(grad: np.ndarray, normal: np.ndarray, inverse: np.ndarray, gain: np.ndarray, centred: bool) -> Gradients:
    """Gradients of a norm's x, gain and bias. normal: x normalised, before the gain; inverse: 1 / its divisor."""
    to_normal = grad * gain
    to_x = to_normal - normal * np.mean(to_normal * normal, axis=-1, keepdims=True)
    if centred:
        to_x = to_x - to_normal.mean(axis=-1, keepdims=True)
    rows, heads = (tuple(range(grad.ndim - axes)) for axes in (1, gain.ndim))
    return to_x * inverse, (grad * normal).sum(axis=heads).reshape(-1), grad.sum(axis=rows)
