"""Arrays over NumPy buffers and a reverse-mode tape over the coarse operations, for backends without autodiff.

`TapedBackend` lifts a set of raw kernels (functions from ndarrays to ndarrays, see `reference.NumpyKernels`) to the
contract. It knows neither how an operation is computed nor its derivative: `kernels.op(*inputs, *rest)` is the one,
`kernels.op_vjp(grad, need, *inputs, *rest)` the other, which returns a gradient for each input that `need` asks for.
Outside `value_and_grad` nothing is recorded and an operation costs one Python call more than its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import moments
from .base import (
    A,
    AttentionSpec,
    Backend,
    Footprint,
    RouteRule,
    Routing,
    Sampled,
    SamplingParams,
    Step,
    W,
    keeps_float32,
)


class Node:
    """One recorded result: where its gradient gathers, and how it flows back to the nodes it came from."""

    __slots__ = ("grad", "own", "parents", "pull")

    def __init__(self, parents: Sequence[Node | None] = (), pull: Callable | None = None):
        self.grad: np.ndarray | None = None
        self.own = False  # whether grad is nobody else's: the first to arrive may be shared, their sum is not
        self.parents = parents
        self.pull = pull

    def leave(self) -> tuple[Sequence[Node | None], Callable, np.ndarray | None]:
        """What is known here, let go of: results that are still held hold nodes, and these all that came before."""
        known = self.parents, self.pull, self.grad
        self.parents, self.pull, self.grad = (), None, None
        return known

    def receive(self, grad: np.ndarray, kernels: Any) -> None:
        if self.grad is None:
            self.grad = grad
        elif self.own:
            kernels.accumulate(self.grad, grad)
        else:
            self.grad, self.own = kernels.add(self.grad, grad), True


class Array:
    """A NumPy buffer that belongs to a backend; `node` is set while it is being differentiated."""

    __slots__ = ("data", "node", "ops")

    def __init__(self, ops: TapedBackend, data: np.ndarray, node: Node | None = None):
        self.ops = ops
        self.data = data
        self.node = node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def reshape(self, *shape: int) -> Array:
        return self.ops._call("reshape", (self,), shape)

    def __add__(self, other: Array | float) -> Array:
        return self.ops._call("add", (self, other if type(other) is Array else float(other)))

    def __mul__(self, other: Array | float) -> Array:
        return self.ops._call("mul", (self, other if type(other) is Array else float(other)))

    __radd__ = __add__
    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"Array({self.data!r})"


class HostRouting(Routing):
    """`ids` and `gates` as arrays, and the rule they were elected by."""

    def __init__(self, ids: Array, gates: Array, rule: RouteRule):
        self.ids = ids
        self.gates = gates
        self.rule = rule


class TapedBackend(Backend):
    """A backend over `self.kernels`, which works on ndarrays and its own prepared weights."""

    kernels: Any

    def __init__(self, kernels: Any):
        self.kernels = kernels
        self._tape: list[Node] | None = None  # in order of creation; None: nothing is recorded

    def _call(self, op: str, inputs: tuple, *rest: Any) -> Array:
        """`op` of the kernels. inputs: what may be differentiated (arrays, weights, None); rest: what may not."""
        raw = [i.data if type(i) is Array else i for i in inputs]
        result = getattr(self.kernels, op)(*raw, *rest)
        return Array(self, result) if self._tape is None else self._recorded(op, result, inputs, raw, rest)

    def _recorded(self, op: str, result: np.ndarray, inputs: tuple, raw: list, rest: tuple) -> Array:
        parents = [i.node if type(i) is Array else None for i in inputs]
        need = tuple(parent is not None for parent in parents)
        if not any(need):
            return Array(self, result)
        vjp, kept = getattr(self.kernels, op + "_vjp"), self._kept(op, raw, need)
        return self._push(result, parents, lambda grad: vjp(grad, need, *kept, *rest))

    def _kept(self, op: str, raw: list, need: tuple[bool, ...]) -> list:
        """What the backward pass will read of an operation's inputs; of other arrays nothing stays but the shape."""
        reads = self.kernels.READS.get(op)
        if reads is None:
            return raw
        wanted = {i for which, asked in zip(reads, need, strict=True) if asked for i in which}
        return [_shape_of(r) if type(r) is np.ndarray and i not in wanted else r for i, r in enumerate(raw)]

    def _push(self, result: np.ndarray, parents: Sequence[Node | None], pull: Callable) -> Array:
        node = Node(parents, pull)
        self._tape.append(node)
        return Array(self, result, node)

    # ---- life and transfer

    def array(self, values: np.ndarray, dtype: str | None = None) -> A:
        keeps_float32(dtype)  # activations are no narrower here
        values = np.asarray(values)
        kind = self.kernels.dtype if values.dtype.kind == "f" else np.int32
        return Array(self, np.array(values, kind, order="C"))

    def numpy(self, a: A) -> np.ndarray:
        return a.data

    def zeros(self, shape: Sequence[int]) -> A:
        return Array(self, np.zeros(shape, self.kernels.dtype))

    def prepare(self, tensor) -> W:
        return self.kernels.prepare(tensor)

    def footprint(self, tensor) -> Footprint:
        return self.kernels.footprint(tensor)

    def release(self, weight: W) -> None:
        self.kernels.release(weight)

    def dequantize(self, weight: W) -> A:
        return weight if type(weight) is Array else Array(self, self.kernels.dequantize(weight))

    # ---- forward

    def embed(self, weight: W, ids: A) -> A:
        return self._call("embed", (weight,), ids.data)

    def linear(self, x: A, weight: W, bias: W | None = None) -> A:
        return self._call("linear", (x, weight, bias))

    def adapted_linear(self, x: A, weight: W, bias: W | None, down: W, up: W, scale: float) -> A:
        return self._call("adapted_linear", (x, weight, bias, down, up), scale)

    def rms_norm(self, x: A, gain: W | None, eps: float, offset: float = 0.0) -> A:
        return self._call("rms_norm", (x, gain), eps, offset)

    def layer_norm(self, x: A, gain: W | None, bias: W | None, eps: float) -> A:
        return self._call("layer_norm", (x, gain, bias), eps)

    def rope(self, x: A, step: Step, freqs: np.ndarray, interleaved: bool = False, scale: float = 1.0) -> A:
        return self._call("rope", (x,), step, freqs, interleaved, scale)

    def attention(self, q: A, k: A, v: A, sinks: W | None, spec: AttentionSpec, step: Step, layer: int) -> A:
        return self._call("attention", (q, k, v, sinks), spec, step, layer)

    def act(self, x: A, kind: str) -> A:
        return self._call("act", (x,), kind)

    def gated(self, gate: A, up: A, kind: str) -> A:
        return self._call("gated", (gate, up), kind)

    def softcap(self, x: A, cap: float) -> A:
        return self._call("softcap", (x,), cap)

    def take(self, x: A, rows: np.ndarray) -> A:
        return self._call("take", (x,), rows)

    def split(self, x: A, sizes: Sequence[int]) -> tuple[A, ...]:
        ends = np.cumsum(sizes).tolist()
        return tuple(self._call("piece", (x,), end - size, end) for size, end in zip(sizes, ends, strict=True))

    # ---- experts

    def route(self, logits: A, k: int, rule: RouteRule, bias: W | None = None) -> Routing:
        ids = self.kernels.elect(logits.data, k, rule, bias.data if type(bias) is Array else bias)
        return HostRouting(Array(self, ids), self._call("gates", (logits,), ids, rule), rule)

    def expert_linear(self, x: A, weight: W, routing: Routing, bias: W | None = None) -> A:
        gates = routing.gates if routing.rule.gate_on_input and len(x.shape) == 2 else None
        return self._call("expert_linear", (x, weight, bias, gates), routing.ids.data)

    def combine(self, y: A, routing: Routing) -> A:
        return self._call("combine", (y, None if routing.rule.gate_on_input else routing.gates))

    # ---- latent attention

    def latent_attention(
        self, q_nope: A, q_rope: A, c: A, k_rope: A, wk: W, wv: W, spec: AttentionSpec, step: Step, layer: int
    ) -> A:
        return self._call("latent_attention", (q_nope, q_rope, c, k_rope, wk, wv), spec, step, layer)

    # ---- mixers with a state

    def short_convolution(self, x: A, weight: W, bias: W | None, step: Step, layer: int) -> A:
        return self._call("short_convolution", (x, weight, bias), step, layer)

    def gated_delta(self, q: A, k: A, v: A, a: A, b: A, rate: W, shift: W, step: Step, layer: int) -> A:
        return self._call("gated_delta", (q, k, v, a, b, rate, shift), step, layer)

    # ---- sampling

    def sample(
        self,
        logits: A,
        params: Sequence[SamplingParams],
        u: np.ndarray,
        counts: tuple[np.ndarray, np.ndarray] | None = None,
        mask: np.ndarray | None = None,
    ) -> Sampled:
        ids, logprobs, top = self.kernels.sample(logits.data, params, u, counts, mask)
        return Sampled(
            Array(self, ids),
            None if logprobs is None else Array(self, logprobs),
            None if top is None else (Array(self, top[0]), Array(self, top[1])),
        )

    # ---- training

    def token_loss(self, logits: A, targets: A) -> A:
        return self._call("token_loss", (logits,), targets.data)

    def dropout(self, x: A, rate: float, seed: int, step: int) -> A:
        return self._call("dropout", (x,), rate, seed, step)

    def inverse_norm(self, weight: W, down: A, up: A, scale: float) -> A:
        raw = (i.data if type(i) is Array else i for i in (weight, down, up))
        return Array(self, self.kernels.inverse_norm(*raw, scale))

    def sum(self, x: A) -> A:
        return self._call("sum", (x,))

    def quantized(self, codes: np.ndarray, scales: A, biases: A, bits: int, group_size: int) -> W:
        return self._call("affine", (scales, biases), codes, bits, group_size)

    def value_and_grad(self, fn: Callable) -> Callable:
        def differentiated(params: Mapping[str, Array], *arrays: Any):
            leaves = {name: Array(self, p.data, Node()) for name, p in params.items()}
            with self._recording() as tape, self._differentiating():
                loss, aux = fn(leaves, *arrays)
                self._backward(tape, loss, np.ones_like(loss.data))
            return (Array(self, loss.data), aux), {name: self._gradient(leaf) for name, leaf in leaves.items()}

        return differentiated

    def remat(self, fn: Callable) -> Callable:
        def rematerialised(params: Mapping[str, Array], *arrays: Any) -> Array:
            inputs = [*params.values(), *arrays]
            parents = [i.node if type(i) is Array else None for i in inputs]
            raw = [Array(self, i.data) if type(i) is Array else i for i in inputs]
            names = list(params)

            def run(values: list) -> Array:
                return fn(dict(zip(names, values, strict=False)), *values[len(names) :])

            def pull(grad: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray | None]]:
                """The result; and gradients, where the result is one number also before its own is known."""
                leaves = [Array(self, r.data, Node()) if p else r for r, p in zip(raw, parents, strict=True)]
                with self._recording() as tape:
                    again = run(leaves)
                    if grad is None and again.data.size == 1:
                        grad = np.ones_like(again.data)
                    if grad is not None:
                        self._backward(tape, again, grad)
                return again.data, [leaf.node.grad if p else None for leaf, p in zip(leaves, parents, strict=True)]

            if self._tape is None or not any(parents):
                return run(raw)
            result, slopes = pull(None)
            if result.size == 1:  # its gradient is a multiple of these: nothing has to be computed again
                return self._push(result, parents, lambda grad: [s if s is None else s * grad for s in slopes])
            return self._push(result, parents, lambda grad: pull(grad)[1])

        return rematerialised

    def adamw(
        self, params: Mapping[str, A], grads: Mapping[str, A], state: dict, step: int, rate: float,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0, bits: int = 32,
    ) -> tuple[dict[str, A], dict[str, A]]:  # fmt: skip
        fresh, kept = {}, {}
        for name, param in params.items():
            packed = moments.packed(param.data.size, bits)
            run, parts = (self.kernels.adamw8, moments.PACKED) if packed else (self.kernels.adamw, moments.PLAIN)
            old = [state[f"{name}.{part}"].data if state else None for part in parts]
            new, *more = run(param.data, grads[name].data, *old, step, rate, betas, eps, decay)
            fresh[name] = Array(self, new)
            kept |= {f"{name}.{part}": Array(self, values) for part, values in zip(parts, more, strict=True)}
        return fresh, kept

    def _gradient(self, leaf: Array) -> Array:
        return Array(self, np.zeros_like(leaf.data) if leaf.node.grad is None else leaf.node.grad)

    @contextmanager
    def _recording(self, on: bool = True):
        """Everything computed inside goes on a fresh tape (or, when off, on none)."""
        outer, self._tape = self._tape, [] if on else None
        try:
            yield self._tape
        finally:
            self._tape = outer

    @contextmanager
    def _differentiating(self):
        outer, self.kernels.differentiating = self.kernels.differentiating, True
        try:
            yield
        finally:
            self.kernels.differentiating = outer

    def _backward(self, tape: list[Node], result: Array, grad: np.ndarray) -> None:
        """Send `grad` back from `result` to the leaves; the tape is emptied on the way, so that buffers go early."""
        if result.node is not None:
            result.node.receive(grad, self.kernels)
        while tape:
            parents, pull, grad = tape.pop().leave()
            if grad is None:
                continue
            for parent, share in zip(parents, pull(grad), strict=True):
                if parent is not None and share is not None:
                    parent.receive(share, self.kernels)


def _shape_of(a: np.ndarray) -> np.ndarray:
    """An array of the same shape that takes no memory."""
    return np.broadcast_to(np.zeros((), a.dtype), a.shape)
