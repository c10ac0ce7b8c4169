"""Every operation in plain NumPy: slow, small, and the definition of what is right.

`NumpyKernels` works on ndarrays; `tape.TapedBackend` lifts it to the contract. Its derivatives are in
`reference_gradients.py`. Other host backends subclass the kernels and replace what they do faster.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import noise, schemes
from ..errors import BadOption, ContextFull, Unsupported
from ..registry import Plugin, Probe
from ..tensors import STORAGE, Dense, Tensor, floats, store
from . import moments, sampling
from .base import (
    FEATURES,
    AttentionSpec,
    Cache,
    Footprint,
    Info,
    LayerCache,
    RouteRule,
    SamplingParams,
    StateCache,
    Step,
    cache_dtype,
)
from .numerics import (
    activation,
    expert_inputs,
    gains,
    log_softmax,
    rival_shares,
    rotate,
    sigmoid,
    softmax,
    to_int8,
    visible,
)
from .recurrence import NumpyRecurrence
from .reference_gradients import NumpyGradients
from .tape import TapedBackend


class HostWeight:
    """A host tensor, dequantized when first used and kept that way."""

    __slots__ = ("dense", "shape", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape
        self.dense: np.ndarray | None = None


class HostStates:
    """One layer's states: conv [slots, taps - 1, C], memory [slots, H, dk, dv]."""

    def __init__(self, conv: np.ndarray, memory: np.ndarray):
        self.conv, self.memory = conv, memory

    @classmethod
    def of(cls, spec: LayerCache | StateCache, slots: int, dtype: str = "float32") -> HostStates:
        """Room for a layer's; none where it keeps keys and values."""
        shapes = (spec.conv, spec.memory) if isinstance(spec, StateCache) else ((), ())
        return cls(*(np.zeros((slots, *(shape or (0,))), dtype) for shape in shapes))

    def slot(self, slot: int) -> HostStates:
        return HostStates(self.conv[slot], self.memory[slot])

    def copy(self) -> HostStates:
        return HostStates(self.conv.copy(), self.memory.copy())

    def set(self, other: HostStates) -> None:
        self.conv[...], self.memory[...] = other.conv, other.memory

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.memory.nbytes


def attention_part(spec: LayerCache | StateCache) -> LayerCache:
    """What a layer keeps by token: nothing where it keeps a state."""
    return LayerCache(0, 0, 0) if isinstance(spec, StateCache) else spec


class HostCache(Cache):
    """Keys and values in host memory, by layer: [slots, K, capacity, d], zeroed by the kernel page by page on first
    use; with int8 come `scales`, [slots, K, capacity, 1] of keys and of values; and states. Nothing is a ring:
    `truncate` goes back to any length, or to 0 where there are states."""

    def __init__(self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: str = "float32"):
        def room(spec: LayerCache, width: int, kind: str = dtype) -> np.ndarray:
            return np.zeros((slots, spec.kv_heads, capacity, width), STORAGE[kind])

        self.recurrent = any(isinstance(spec, StateCache) for spec in specs)
        self.states = [HostStates.of(spec, slots, "float64" if dtype == "float64" else "float32") for spec in specs]
        specs = [attention_part(spec) for spec in specs]
        self.specs = tuple(specs)
        self.capacity = capacity
        self.dtype = dtype
        self.lengths = np.zeros(slots, np.int32)
        self.keys = [room(spec, spec.key_dim) for spec in specs]
        self.values = [room(spec, spec.value_dim) for spec in specs]
        scaled = int(dtype == "int8")
        self.scales = [(room(spec, scaled, "float32"), room(spec, scaled, "float32")) for spec in specs]

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return (*self.keys, *self.values, *(scales for pair in self.scales for scales in pair))

    def write(self, layer: int, slot: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """keys [n, K, d] and values [n, K, dv] to positions start … start + n - 1. Raises ContextFull."""
        end = start + len(keys)
        if end > self.capacity:
            raise ContextFull(
                f"{end} tokens do not fit in a cache of {self.capacity}.", "Shorten the prompt or raise the context."
            )
        kept = (self.keys[layer], self.values[layer])
        for into, scales, new in zip(kept, self.scales[layer], (keys, values), strict=True):
            new = new.swapaxes(0, 1)
            if self.dtype == "int8":
                into[slot, :, start:end], scales[slot, :, start:end] = to_int8(new)
            else:
                into[slot, :, start:end] = new if new.dtype == into.dtype else store(new, self.dtype)

    def read(self, layer: int, slot: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys [K, end, d] and values [K, end, dv] of positions 0 … end - 1."""
        keys, values = self.keys[layer][slot, :, :end], self.values[layer][slot, :, :end]
        if self.dtype in ("float32", "float64"):
            return keys, values
        if self.dtype == "int8":
            by_key, by_value = (scales[slot, :, :end] for scales in self.scales[layer])
            return keys * by_key, values * by_value
        return floats(keys, self.dtype), floats(values, self.dtype)

    def snapshot(self, slot: int) -> Any:
        n = int(self.lengths[slot])
        states = [layer.slot(slot).copy() for layer in self.states]
        return n, [part[slot, :, :n].copy() for part in self.parts], states

    def restore(self, slot: int, state: Any) -> None:
        n, parts, states = state
        for part, kept in zip(self.parts, parts, strict=True):
            part[slot, :, :n] = kept
        for layer, kept in zip(self.states, states, strict=True):
            layer.slot(slot).set(kept)
        self.lengths[slot] = n

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.parts, *self.states))


class NumpyKernels(NumpyRecurrence, NumpyGradients):
    """The operations on ndarrays of `dtype` (float32; float64 to check gradients) and HostWeights."""

    differentiating = False  # set by the tape: results are wanted as exactly as gradients need them

    def __init__(self, dtype: str = "float32"):
        self.dtype = np.dtype(dtype)

    # ---- weights

    def prepare(self, tensor: Tensor) -> HostWeight:
        return HostWeight(tensor)

    def footprint(self, tensor: Tensor) -> Footprint:
        as_it_is = tensor.format == Dense(str(self.dtype))
        return Footprint(0 if as_it_is else tensor.size * self.dtype.itemsize, tensor.nbytes)

    def release(self, weight: HostWeight) -> None:
        weight.dense = None

    def dequantize(self, weight: HostWeight) -> np.ndarray:
        return self.values(weight)

    def values(self, weight: HostWeight | np.ndarray | None) -> np.ndarray | None:
        """A weight's numbers in full; arrays and None pass."""
        if not isinstance(weight, HostWeight):
            return weight
        if weight.dense is None:
            weight.dense = schemes.to_float(weight.tensor).astype(self.dtype, copy=False)
        return weight.dense

    # ---- arithmetic and views

    def add(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        return a + b

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        return a * b

    def reshape(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return x.reshape(shape)

    def sum(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x.sum(dtype=x.dtype))

    def take(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return x[rows]

    def piece(self, x: np.ndarray, start: int, end: int) -> np.ndarray:
        """One of `split`'s results: a view of the last axis."""
        return x[..., start:end]

    # ---- linear maps

    def embed(self, weight: Any, ids: np.ndarray) -> np.ndarray:
        return self.values(weight)[ids]

    def linear(self, x: np.ndarray, weight: Any, bias: Any = None) -> np.ndarray:
        w = self.values(weight)
        y = (x.reshape(-1, x.shape[-1]) @ w.T).reshape(*x.shape[:-1], w.shape[0])
        return y if bias is None else y + self.values(bias)

    def adapted_linear(
        self, x: np.ndarray, weight: Any, bias: Any, down: np.ndarray, up: np.ndarray, scale: float
    ) -> np.ndarray:
        return self.linear(x, weight, bias) + self.linear(self.linear(x, down), up) * scale

    # ---- norms and functions of one number

    def rms_norm(self, x: np.ndarray, gain: Any, eps: float, offset: float = 0.0) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * self.gains(gain, x, offset)

    def layer_norm(self, x: np.ndarray, gain: Any, bias: Any, eps: float) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * self.gains(gain, x)
        return y if bias is None else y + self.values(bias)

    def gains(self, gain: Any, x: np.ndarray, offset: float = 0.0) -> np.ndarray:
        return gains(self.values(gain), x, offset)

    def act(self, x: np.ndarray, kind: str) -> np.ndarray:
        return activation(kind)[0](x)

    def gated(self, gate: np.ndarray, up: np.ndarray, kind: str) -> np.ndarray:
        return self.act(gate, kind) * up

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        return cap * np.tanh(x / cap)

    # ---- positions and attention

    def angles(self, step: Step, tokens: int, freqs: np.ndarray) -> np.ndarray:
        """[B, T, r / 2]"""
        positions = step.starts[:, None] + np.arange(tokens)
        return positions.astype(self.dtype)[:, :, None] * freqs

    def rope(
        self, x: np.ndarray, step: Step, freqs: np.ndarray, interleaved: bool = False, scale: float = 1.0
    ) -> np.ndarray:
        return rotate(x, self.angles(step, x.shape[1], freqs), interleaved, scale)

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: Any, spec: AttentionSpec, step: Step, layer: int
    ) -> np.ndarray:
        out = np.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
        for row, n in enumerate(step.lengths.tolist()):
            keys, values, seen = self.context(k, v, spec, step, layer, row)
            out[row, :n] = self.attend(q[row, :n], keys, values, self.values(sinks), seen, spec)
        return out

    def context(
        self, k: np.ndarray, v: np.ndarray, spec: AttentionSpec, step: Step, layer: int, row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a row's queries may look at: keys [K, S, d] and values [K, S, dv], which are written to the cache first
        if there is one, and which of them each query sees [T, S]."""
        start, n = int(step.starts[row]), int(step.lengths[row])
        keys, values, where = k[row, :n], v[row, :n], np.arange(start, start + n)
        if step.cache is None:
            segments = None if step.segments is None else (step.segments[row, :n], step.segments[row, :n])
            return keys.swapaxes(0, 1), values.swapaxes(0, 1), visible(where, where, spec, segments)
        if step.segments is not None:
            raise Unsupported("Packed segments and a cache exclude each other.", "Give each document its own row.")
        slot = int(step.slots[row])
        step.cache.write(layer, slot, start, keys, values)
        return *step.cache.read(layer, slot, start + n), visible(where, np.arange(start + n), spec)

    def attend(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, sinks: np.ndarray | None, seen: np.ndarray,
        spec: AttentionSpec,
    ) -> np.ndarray:  # fmt: skip
        """One row: q [T, H, d], keys [K, S, d], values [K, S, dv], seen [T, S] -> [T, H, dv]"""
        group = q.shape[1] // len(keys)
        heads = [
            self.weights(q[:, h], keys[h // group], None if sinks is None else sinks[h], seen, spec)
            @ values[h // group]
            for h in range(q.shape[1])
        ]
        return np.stack(heads, axis=1)

    def weights(
        self, q: np.ndarray, keys: np.ndarray, sink: float | None, seen: np.ndarray, spec: AttentionSpec
    ) -> np.ndarray:
        """One head: q [T, d], keys [S, d] -> what each query takes of each value, [T, S]"""
        scores = q @ keys.T * spec.scale
        if spec.softcap is not None:
            scores = self.softcap(scores, spec.softcap)
        scores = np.where(seen, scores, -np.inf).astype(q.dtype, copy=False)
        if sink is None:
            return softmax(scores)
        with_sink = np.concatenate([scores, np.full((len(scores), 1), sink, scores.dtype)], axis=-1)
        return softmax(with_sink)[:, :-1]

    def latent_attention(
        self, q_nope: np.ndarray, q_rope: np.ndarray, c: np.ndarray, k_rope: np.ndarray, wk: Any, wv: Any,
        spec: AttentionSpec, step: Step, layer: int,
    ) -> np.ndarray:  # fmt: skip
        """Absorbed: a query meets the latent itself, q_nope . (wk c) = (wk^T q_nope) . c, and what it takes of the
        latents is expanded once."""
        q, k = self.absorbed(q_nope, q_rope, c, k_rope, self.values(wk))
        mixed = np.zeros((*q.shape[:3], c.shape[-1]), q.dtype)
        for row, n in enumerate(step.lengths.tolist()):
            keys, _, seen = self.context(k, k[..., :0], spec, step, layer, row)
            mixed[row, :n] = self.attend(q[row, :n], keys, keys[..., : c.shape[-1]], None, seen, spec)
        return np.einsum("bthl,hvl->bthv", mixed, self.values(wv))

    def absorbed(
        self, q_nope: np.ndarray, q_rope: np.ndarray, c: np.ndarray, k_rope: np.ndarray, wk: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries [B, T, H, L + r] and the one key head [B, T, 1, L + r] that they meet."""
        q = np.concatenate([np.einsum("bthn,hnl->bthl", q_nope, wk), q_rope], axis=-1)
        return q, np.concatenate([c, k_rope], axis=-1)[:, :, None]

    # ---- experts

    def elect(self, logits: np.ndarray, k: int, rule: RouteRule, bias: Any = None) -> np.ndarray:
        """logits [N, E] -> ids [N, k] int32 in order of falling score; equal scores elect the lower id."""
        scores = self.scores(logits, rule)
        if bias is not None:
            scores = scores + self.values(bias)
        if rule.groups > 1:
            grouped = scores.reshape(len(scores), rule.groups, -1)
            strength = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
            losers = np.argsort(-strength, axis=-1, kind="stable")[:, rule.top_groups :]
            grouped = grouped.copy()
            np.put_along_axis(grouped, losers[:, :, None], -np.inf, axis=1)
            scores = grouped.reshape(scores.shape)
        return np.argsort(-scores, axis=-1, kind="stable")[:, :k].astype(np.int32)

    def scores(self, logits: np.ndarray, rule: RouteRule) -> np.ndarray:
        if rule.scoring == "sparsemixer":
            return logits
        return softmax(logits) if rule.scoring == "softmax" else sigmoid(logits)

    def gates(self, logits: np.ndarray, ids: np.ndarray, rule: RouteRule) -> np.ndarray:
        """What the elected experts count, [N, k]; the election's bias plays no part."""
        if rule.scoring == "sparsemixer":
            gates = np.take_along_axis(rival_shares(logits, ids, rule.jitter), ids[..., None], axis=-1)[..., 0]
        else:
            gates = np.take_along_axis(self.scores(logits, rule), ids, axis=-1)
        if rule.renormalise:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        return gates * rule.scale

    def expert_linear(
        self, x: np.ndarray, weight: Any, bias: Any, gates: np.ndarray | None, ids: np.ndarray
    ) -> np.ndarray:
        w, b = self.values(weight), self.values(bias)
        x = expert_inputs(x, gates, ids)
        y = np.zeros((*ids.shape, w.shape[1]), x.dtype)
        for expert in np.unique(ids):
            chosen = ids == expert
            y[chosen] = x[chosen] @ w[expert].T + (0.0 if b is None else b[expert])
        return y

    def combine(self, y: np.ndarray, gates: np.ndarray | None) -> np.ndarray:
        return y.sum(axis=1) if gates is None else (y * gates[..., None]).sum(axis=1)

    # ---- sampling

    def sample(
        self, logits: np.ndarray, params: Sequence[SamplingParams], u: np.ndarray, counts: Any, mask: Any
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:
        return sampling.sample(logits, params, u, counts, mask)

    # ---- training

    def token_loss(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        logprobs = log_softmax(logits)
        if targets.ndim == 2:
            return -(softmax(targets) * logprobs).sum(axis=-1)
        picked = np.take_along_axis(logprobs, np.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return np.where(targets >= 0, -picked, 0.0).astype(logits.dtype, copy=False)

    def dropout(self, x: np.ndarray, rate: float, seed: int, step: int) -> np.ndarray:
        return x * self.kept(x.shape, rate, seed, step)

    def kept(self, shape: tuple[int, ...], rate: float, seed: int, step: int) -> np.ndarray:
        """0 where dropout strikes, 1 / (1 - rate) elsewhere."""
        return (noise.uniform(seed, "dropout", step, shape) >= rate).astype(self.dtype) / self.dtype.type(1.0 - rate)

    def inverse_norm(self, weight: Any, down: np.ndarray, up: np.ndarray, scale: float) -> np.ndarray:
        return 1 / np.linalg.norm(self.values(weight) + scale * (self.values(up) @ self.values(down)), axis=-1)

    def affine(
        self, scales: np.ndarray, biases: np.ndarray, codes: np.ndarray, bits: int, group_size: int
    ) -> np.ndarray:
        """MLX's packed codes with scales and biases [O, I / group_size] -> the weight, [O, I]"""
        grouped = self.codes(codes, scales, bits, group_size)
        return (grouped * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)

    def codes(self, packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int) -> np.ndarray:
        """Unpacked, [O, I / group_size, group_size]"""
        columns = scales.shape[-1] * group_size
        return schemes.unpack(packed, bits, columns).reshape(*scales.shape, group_size).astype(self.dtype)

    def adamw(
        self, param: np.ndarray, grad: np.ndarray, m: np.ndarray | None, v: np.ndarray | None, step: int, rate: float,
        betas: tuple[float, float], eps: float, decay: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        m = (1 - betas[0]) * grad if m is None else betas[0] * m + (1 - betas[0]) * grad
        v = (1 - betas[1]) * grad * grad if v is None else betas[1] * v + (1 - betas[1]) * grad * grad
        moved = (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
        return param * (1 - rate * decay) - rate * moved, m, v

    def adamw8(
        self, param: np.ndarray, grad: np.ndarray, m: np.ndarray | None, m_scale: np.ndarray | None,
        r: np.ndarray | None, r_scale: np.ndarray | None, step: int, rate: float, betas: tuple[float, float],
        eps: float, decay: float,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        """As `adamw`, with the first moment and the second's root as `moments.compress` writes them."""
        first = None if m is None else moments.expand(m, m_scale, param.shape, signed=True)
        second = None if r is None else moments.expand(r, r_scale, param.shape, signed=False) ** 2
        param, first, second = self.adamw(param, grad, first, second, step, rate, betas, eps, decay)
        return param, *moments.compress(first, signed=True), *moments.compress(np.sqrt(second), signed=False)


class ReferenceBackend(TapedBackend):
    """The contract over NumpyKernels. Always exact."""

    name = "reference"
    features = frozenset(FEATURES) - {"compile", "burst"}
    exact = True

    def __init__(self, kernels: NumpyKernels):
        super().__init__(kernels)

    def info(self) -> Info:
        device = f"NumPy {np.__version__} on {platform.machine()}"
        return Info(self.name, device, str(self.kernels.dtype), self.exact, self.features)

    def new_cache(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: str | None = None) -> HostCache:
        kept = cache_dtype(dtype, self.features) if dtype else str(self.kernels.dtype)
        return HostCache(specs, slots, capacity, kept)


def probe() -> Probe:
    return Probe.available(f"NumPy on {platform.machine()}", priority=0, reason="the definition, not made for speed")


def create(exact: bool = False, threads: int | None = None, dtype: str = "float32") -> ReferenceBackend:
    """exact: always so, whatever is asked for. dtype: float32, or float64 to check gradients. Raises BadOption for
    other types and for `threads`, which are NumPy's own affair."""
    if threads is not None:
        raise BadOption("The reference backend does not choose its threads.", "Set OMP_NUM_THREADS for NumPy instead.")
    if dtype not in ("float32", "float64"):
        raise BadOption(f"The reference backend does not compute in {dtype!r}.", "Choose float32 or float64.")
    return ReferenceBackend(NumpyKernels(dtype))


plugin = Plugin("reference", probe, create)
