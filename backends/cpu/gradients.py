"""Derivatives on the native kernels; what has none of its own is NumPy's, from the reference.

Products have float32 sums, over dense and quantized weights alike; those with frozen weights are of numbers rounded to
bfloat16 where that is `narrow`, all others of float32. A quantized weight is unpacked a strip at a time inside the
product, forward and backward, and never written out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .. import moments
from ..base import AttentionSpec, Step
from ..numerics import expert_inputs
from ..reference_gradients import Gradients, Need, NumpyGradients
from .arguments import ACTIVATIONS, native_mask, native_step, ones

CODES = [(moments.levels(signed), moments.code(7 if signed else 8)) for signed in (True, False)]
TABLES = [(levels, code.edges, code.starts) for levels, code in CODES]  # of the first moment, and of the second's root
NARROW = 16  # columns of a kernel's panel: a result narrower than that is computed turned


class NativeGradients:
    """A mixin of NativeKernels, in front of NumpyKernels."""

    READS: ClassVar = NumpyGradients.READS | {
        "adapted": ((1, 3, 4), (0,), (), (0, 4), (5,), ()),
        "expert_linear": ((1, 3), (0, 3), (), (0, 1)),
    }

    # ---- linear maps

    def product(
        self, x: np.ndarray, weight: Any, *, back: bool = False, turned: bool = False, scale: float = 1.0,
        more: tuple[np.ndarray, Any, float] | None = None, bias: Any = None, expert: int = 0,
    ) -> np.ndarray:  # fmt: skip
        """scale * x . weight^T (`back`: . weight), plus the same of `more` = (x, weight, scale), plus bias.
        x [..., depth]; `turned`: [depth, tokens]. expert: which matrix of a stack."""
        x, w = self.plain(x), self._matrix(weight)
        x2, w2, scale2 = more or (None, None, 1.0)
        width = weight.shape[-1] if back else weight.shape[-2]
        shape = (x.shape[1], width) if turned else (*x.shape[:-1], width)
        second = (None, None) if x2 is None else (self.plain(x2), self._matrix(w2))
        narrow = self.narrow and not isinstance(weight, np.ndarray)
        rest = scale2, self.vector(bias), False, narrow
        return self.call(self.machine.products, x, w, expert, back, turned, scale, *second, *rest, shape=shape)

    def outer(self, a: np.ndarray, b: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """scale * a^T . b over all tokens: a [..., O], b [..., I] -> [O, I]"""
        a, b = (self.plain(x).reshape(-1, x.shape[-1]) for x in (a, b))
        if b.shape[1] < NARROW <= a.shape[1]:
            return np.ascontiguousarray(self.outer(b, a, scale).T)
        return self.product(a, b, back=True, turned=True, scale=scale)

    def linear_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, weight: Any, bias: Any) -> Gradients:
        return (
            self.product(grad, weight, back=True) if need[0] else None,
            self.outer(grad, x) if need[1] else None,
            _over_tokens(grad) if need[2] else None,
        )

    def adapted(
        self, x: np.ndarray, weight: Any, bias: Any, down: Any, up: Any, low: np.ndarray, scale: float
    ) -> np.ndarray:
        """adapted_linear, where low = x . down^T is known: it is narrow, and kept for the way back."""
        return self.product(x, weight, more=(low, up, scale), bias=bias)

    def adapted_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, weight: Any, bias: Any, down: Any, up: Any, low: np.ndarray,
        scale: float,
    ) -> Gradients:  # fmt: skip
        to_low = self.product(grad, up, back=True, scale=scale) if need[0] or need[3] else None
        return (
            self.product(grad, weight, back=True, more=(to_low, down, 1.0)) if need[0] else None,
            self.outer(grad, x) if need[1] else None,
            _over_tokens(grad) if need[2] else None,
            self.outer(to_low, x) if need[3] else None,
            self.outer(grad, low, scale) if need[4] else None,
            None,
        )

    def expert_linear_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, weight: Any, bias: Any, gates: np.ndarray | None,
        ids: np.ndarray,
    ) -> Gradients:  # fmt: skip
        """Expert by expert: the tokens that went to it, in one product each way."""
        inputs = expert_inputs(x, gates, ids) if need[1] else None
        to_inputs = np.zeros((*ids.shape, weight.shape[-1]), np.float32) if need[0] or need[3] else None
        to_weight = np.zeros(weight.shape, np.float32) if need[1] else None
        to_bias = np.zeros(weight.shape[:2], np.float32) if need[2] else None
        for expert in np.unique(ids).tolist():
            chosen = ids == expert
            share = grad[chosen]
            if to_inputs is not None:
                to_inputs[chosen] = self.product(share, weight, back=True, expert=expert)
            if need[1]:
                to_weight[expert] = self.outer(share, inputs[chosen])
            if need[2]:
                to_bias[expert] = share.sum(axis=0)
        to_gates = (to_inputs * expert_inputs(x, None, ids)).sum(axis=-1) if need[3] else None
        if not need[0]:
            return None, to_weight, to_bias, to_gates
        to_x = to_inputs if gates is None else to_inputs * gates[..., None]
        return to_x.sum(axis=1) if x.ndim == 2 else to_x, to_weight, to_bias, to_gates

    # ---- arithmetic, norms and functions of one number

    def accumulate(self, into: np.ndarray, more: np.ndarray) -> None:
        self.machine.add(into, self.plain(more), into)

    def mul_vjp(self, grad: np.ndarray, need: Need, a: np.ndarray, b: np.ndarray | float) -> Gradients:
        return (self.mul(grad, b), None) if isinstance(b, float) else super().mul_vjp(grad, need, a, b)

    def gated_vjp(self, grad: np.ndarray, need: Need, gate: np.ndarray, up: np.ndarray, kind: str) -> Gradients:
        to_up = self.empty(up.shape)
        return self._gate_back(grad, gate, self.plain(up), kind, to_up), to_up

    def act_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, kind: str) -> Gradients:
        return (self._gate_back(grad, x, None, kind, None),)

    def _gate_back(self, grad: np.ndarray, gate: np.ndarray, up: Any, kind: str, to_up: Any) -> np.ndarray:
        out = self.empty(gate.shape)
        self.machine.gated_back(self.plain(grad), self.plain(gate), up, ACTIVATIONS[kind], out, to_up)
        return out

    def rms_norm_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, gain: Any, eps: float, offset: float
    ) -> Gradients:
        if need[1] and gain.shape != x.shape[-1:]:  # each head has its own
            return super().rms_norm_vjp(grad, need, x, gain, eps, offset)
        return self._norm_back(grad, (need[1], False), x, gain, eps, offset, False)[:2]

    def layer_norm_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, gain: Any, bias: Any, eps: float
    ) -> Gradients:
        if need[1] and gain.shape != x.shape[-1:]:
            return super().layer_norm_vjp(grad, need, x, gain, bias, eps)
        return self._norm_back(grad, need[1:], x, gain, eps, 0.0, True)

    def _norm_back(
        self, grad: np.ndarray, need: Need, x: np.ndarray, gain: Any, eps: float, offset: float, centred: bool
    ) -> Gradients:
        grad, x = self.plain(grad), self.plain(x)
        gain, offset = (ones(x.shape[-1]), 0.0) if gain is None else (self.vector(gain), offset)
        sums = [np.empty(gain.shape, np.float32) if asked else None for asked in need]
        to_x = self.call(self.machine.norm_back, grad, x, gain, eps, offset, centred, *sums, shape=x.shape)
        return to_x, *sums

    def softcap_vjp(self, grad: np.ndarray, need: Need, x: np.ndarray, cap: float) -> Gradients:
        return (self.call(self.machine.softcap_back, self.plain(grad), self.plain(x), cap, shape=x.shape),)

    # ---- positions and attention

    def rope_vjp(
        self, grad: np.ndarray, need: Need, x: np.ndarray, step: Step, freqs: np.ndarray, interleaved: bool,
        scale: float,
    ) -> Gradients:  # fmt: skip
        table = self._rope_table(step, x.shape[1], -freqs, scale)  # turned by the angles' opposites
        return (self.call(self.machine.rope, self.plain(grad), table, interleaved, shape=grad.shape),)

    def attention_vjp(
        self, grad: np.ndarray, need: Need, q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: Any,
        spec: AttentionSpec, step: Step, layer: int,
    ) -> Gradients:  # fmt: skip
        if step.cache is not None:
            return super().attention_vjp(grad, need, q, k, v, sinks, spec, step, layer)  # says what is wrong
        inputs, sinks = [self.plain(x) for x in (q, k, v)], self.vector(sinks)
        found = [self.empty(x.shape) for x in inputs]
        to_sinks = None if sinks is None else self.empty((len(q), len(sinks)))
        self.machine.attention_back(
            self.plain(grad), *inputs, sinks, native_mask(spec), native_step(step), *found, to_sinks
        )
        return *found, None if to_sinks is None else to_sinks.sum(axis=0)

    # ---- training

    def token_loss(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        aims = self._aims(targets)
        return self.call(self.machine.token_loss, self.plain(logits), *aims, None, shape=targets.shape[:1])

    def token_loss_vjp(self, grad: np.ndarray, need: Need, logits: np.ndarray, targets: np.ndarray) -> Gradients:
        logits, grad = self.plain(logits), self.plain(grad)
        return (self.call(self.machine.token_loss, logits, *self._aims(targets), grad, shape=logits.shape),)

    def _aims(self, targets: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Ids, or logits that are imitated."""
        return (None, self.plain(targets)) if targets.ndim == 2 else (targets, None)

    def adamw(
        self, param: np.ndarray, grad: np.ndarray, m: np.ndarray | None, v: np.ndarray | None, step: int, rate: float,
        betas: tuple[float, float], eps: float, decay: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        out = [np.empty(param.shape, np.float32) for _ in range(3)]
        given = [None if x is None else self.plain(x) for x in (param, grad, m, v)]
        self.machine.adamw(*given, step, rate, *betas, eps, decay, *out)
        return tuple(out)

    def affine(
        self, scales: np.ndarray, biases: np.ndarray, codes: np.ndarray, bits: int, group_size: int
    ) -> np.ndarray:
        shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
        given = self.plain(scales), self.plain(biases), np.ascontiguousarray(codes), bits, group_size
        return self.call(self.machine.affine, *given, shape=shape)

    def affine_vjp(
        self, grad: np.ndarray, need: Need, scales: np.ndarray, biases: np.ndarray, codes: np.ndarray, bits: int,
        group_size: int,
    ) -> Gradients:  # fmt: skip
        found = np.empty(scales.shape, np.float32), np.empty(scales.shape, np.float32)
        self.machine.affine_back(self.plain(grad), np.ascontiguousarray(codes), bits, group_size, *found)
        return found

    def adamw8(
        self, param: np.ndarray, grad: np.ndarray, m: np.ndarray | None, m_scale: np.ndarray | None,
        r: np.ndarray | None, r_scale: np.ndarray | None, step: int, rate: float, betas: tuple[float, float],
        eps: float, decay: float,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        blocks = moments.blocks(param.size)
        out = [np.empty(param.shape, np.float32)]
        for _ in range(2):
            out += [np.empty(blocks * moments.BLOCK // 4, np.int32), np.empty(blocks, np.float32)]
        old = None if m is None else (m, m_scale, r, r_scale)
        self.machine.adamw8(self.plain(param), self.plain(grad), old, *TABLES, step, rate, *betas, eps, decay, *out)
        return tuple(out)


def _over_tokens(grad: np.ndarray) -> np.ndarray:
    return grad.reshape(-1, grad.shape[-1]).sum(axis=0)
