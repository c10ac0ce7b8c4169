"""The operations on the native kernels; what has none of its own is NumPy's, from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...tensors import Tensor
from .. import sampling
from ..base import SCORINGS, AttentionSpec, RouteRule, SamplingParams, Step
from ..numerics import activation
from ..reference import NumpyKernels
from . import _native
from .arguments import ACTIVATIONS, native_mask, native_step, ones
from .gradients import NativeGradients
from .recording import NotRecordable, Recording
from .weights import NativeWeight, adapter, native_array, numbers

LARGE = 1 << 14  # numbers


class NativeKernels(NativeGradients, NumpyKernels):
    """Arrays are contiguous float32; anything else is copied on the way in. `recording`: calls are written down there
    instead of being made."""

    # The operations that a plan can hold.
    RECORDED = frozenset(
        {"add", "mul", "reshape", "take", "piece", "embed", "linear", "adapted_linear", "rms_norm", "layer_norm", "act"}
        | {"gated", "softcap", "rope", "attention", "latent_attention", "gates", "expert_linear", "combine"}
        | {"short_convolution", "gated_delta"}
    )

    def __init__(self, machine: _native.Machine, exact: bool):
        super().__init__("float32")
        self.machine, self.exact = machine, exact
        self.narrow = machine.pairs and not exact  # in training, products with frozen weights are of bfloat16 numbers
        self.recording: Recording | None = None
        self.arena = _native.Arena()
        self._tables: dict[Any, np.ndarray] = {}

    # ---- calling

    def call(self, kernel: Callable, *arguments: Any, shape: Sequence[int], ids: bool = False) -> np.ndarray:
        """kernel(*arguments, out), out a new array of `shape`: float32, or int32 if they are `ids`."""
        if self.recording is None:
            out = np.empty(shape, np.int32) if ids else self.empty(shape)
            kernel(*arguments, out)
            return out
        plan = self.recording.plan
        out = (plan.empty_ids if ids else plan.empty)(shape)
        kernel(*arguments, out)
        self.recording.keep(arguments)
        return out

    def empty(self, shape: Sequence[int]) -> np.ndarray:
        """A float32 array; from the arena if it is one of the large ones that come and go."""
        large = math.prod(shape) >= LARGE
        return self.arena.empty(shape) if large else np.empty(shape, np.float32)

    def plain(self, x: np.ndarray) -> np.ndarray:
        """x as the kernels take it."""
        if x.dtype == np.float32 and x.flags.c_contiguous:
            return x
        self.eager("an array that must be copied")
        return np.ascontiguousarray(x, np.float32)

    def eager(self, what: str) -> None:
        """What follows is not a kernel call: a plan would miss it."""
        if self.recording is not None:
            raise NotRecordable(what)

    # ---- weights

    def prepare(self, tensor: Tensor) -> NativeWeight:
        return NativeWeight(self.machine, tensor, self.exact)

    def release(self, weight: NativeWeight) -> None:
        weight.native = weight.numbers = weight.adapter = None

    def values(self, weight: NativeWeight | np.ndarray | None) -> np.ndarray | None:
        return numbers(self.machine, weight) if isinstance(weight, NativeWeight) else weight

    def vector(self, weight: NativeWeight | np.ndarray | None) -> np.ndarray | None:
        """A gain or a bias."""
        return weight if weight is None else self.plain(self.values(weight))

    # ---- arithmetic and views

    def add(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        return self._pairwise(self.machine.add, self.machine.add_number, np.add, a, b)

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        if not isinstance(b, float) and a.size and b.shape == (*a.shape[:-1], 1):  # each row by a number: one expert's
            rows = b.size
            x, gates = self.plain(a).reshape(rows, 1, -1), self.plain(b).reshape(rows, 1)
            return self.call(self.machine.combine, x, gates, shape=a.shape)
        return self._pairwise(self.machine.multiply, self.machine.multiply_number, np.multiply, a, b)

    def _pairwise(self, pair: Callable, number: Callable, fallback: Callable, a: Any, b: Any) -> np.ndarray:
        if isinstance(b, float):
            return self.call(number, self.plain(a), b, shape=a.shape)
        if a.ndim < b.ndim:
            a, b = b, a  # both operations commute
        if b.size == 0 or a.shape[a.ndim - b.ndim :] != b.shape:
            self.eager("arithmetic of arrays whose shapes differ")
            return fallback(a, b)
        return self.call(pair, self.plain(a), self.plain(b), shape=a.shape)

    def reshape(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if not x.flags.c_contiguous:
            self.eager("a reshape that must copy")
        return x.reshape(shape)

    def take(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self.recording is None:
            return x[rows]
        return self.call(self.machine.take, self.plain(x), np.array(rows, np.int32), shape=(len(rows), *x.shape[1:]))

    def piece(self, x: np.ndarray, start: int, end: int) -> np.ndarray:
        if self.recording is None:
            return x[..., start:end]
        return self.call(self.machine.piece, self.plain(x), start, shape=(*x.shape[:-1], end - start))

    # ---- linear maps

    def embed(self, weight: Any, ids: np.ndarray) -> np.ndarray:
        rows, columns = weight.shape
        if self.recording is None and ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise IndexError(f"ids outside 0 … {rows - 1}")
        ids = np.ascontiguousarray(ids, np.int32)
        return self.call(self.machine.embed, self._matrix(weight), 0, ids, shape=(*ids.shape, columns))

    def linear(self, x: np.ndarray, weight: Any, bias: Any = None) -> np.ndarray:
        if self.differentiating and self.narrow:
            return self.product(x, weight, bias=bias)
        return self._linear(self.plain(x), weight, bias)

    def adapted_linear(self, x: np.ndarray, weight: Any, bias: Any, down: Any, up: Any, scale: float) -> np.ndarray:
        """One call: the adapter's products are float32, whatever the weight's own is."""
        return self._linear(self.plain(x), weight, bias, adapter(self.machine, down, up, scale, self.exact))

    def _linear(self, x: np.ndarray, weight: Any, bias: Any, change: _native.Adapter | None = None) -> np.ndarray:
        bias, shape = self.vector(bias), (*x.shape[:-1], weight.shape[0])
        if self.exact or self.differentiating or isinstance(weight, np.ndarray) or not weight.native.tiled:
            return self.call(self.machine.linear_float, x, self._matrix(weight), bias, change, shape=shape)
        plain = None if change is None else x
        return self.call(self.machine.linear_int8, self._int8(x), weight.native, bias, plain, change, shape=shape)

    def _matrix(self, weight: NativeWeight | np.ndarray) -> _native.Weight:
        return native_array(weight) if isinstance(weight, np.ndarray) else weight.native

    def _int8(self, x: np.ndarray) -> _native.Activations:
        """x in int8; in a plan, once for all the weights that it meets."""
        if self.recording is None:
            return self.machine.quantize(x)
        last = self.recording.last
        if last is None or last[0] is not x:
            self.recording.last = last = x, self.machine.quantize(x)
            self.recording.keep(last)
        return last[1]

    # ---- norms and functions of one number

    def rms_norm(self, x: np.ndarray, gain: Any, eps: float, offset: float = 0.0) -> np.ndarray:
        gain, offset = (ones(x.shape[-1]), 0.0) if gain is None else (self.vector(gain), offset)
        return self.call(self.machine.rms_norm, self.plain(x), gain, eps, offset, shape=x.shape)

    def layer_norm(self, x: np.ndarray, gain: Any, bias: Any, eps: float) -> np.ndarray:
        gain, bias = ones(x.shape[-1]) if gain is None else self.vector(gain), self.vector(bias)
        return self.call(self.machine.layer_norm, self.plain(x), gain, bias, eps, shape=x.shape)

    def act(self, x: np.ndarray, kind: str) -> np.ndarray:
        activation(kind)  # says what is known if this is not
        return self.call(self.machine.gated, self.plain(x), None, ACTIVATIONS[kind], shape=x.shape)

    def gated(self, gate: np.ndarray, up: np.ndarray, kind: str) -> np.ndarray:
        activation(kind)
        return self.call(self.machine.gated, self.plain(gate), self.plain(up), ACTIVATIONS[kind], shape=gate.shape)

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        return self.call(self.machine.softcap, self.plain(x), cap, shape=x.shape)

    # ---- positions and attention

    def rope(
        self, x: np.ndarray, step: Step, freqs: np.ndarray, interleaved: bool = False, scale: float = 1.0
    ) -> np.ndarray:
        table = self._rope_table(step, x.shape[1], freqs, scale)
        return self.call(self.machine.rope, self.plain(x), table, interleaved, shape=x.shape)

    def _rope_table(self, step: Step, tokens: int, freqs: np.ndarray, scale: float) -> np.ndarray:
        """Cosines and sines [B, T, 2, r / 2], worked out once for all layers of a step."""
        tables = self._tables if self.recording is None else self.recording.tables
        key = (step.starts.tobytes(), tokens, freqs.tobytes(), scale)
        if key not in tables:
            if len(tables) > 8:
                tables.clear()
            starts, freqs = np.ascontiguousarray(step.starts, np.int32), np.ascontiguousarray(freqs, np.float32)
            shape = (len(starts), tokens, 2, len(freqs))
            tables[key] = self.call(self.machine.rope_table, starts, freqs, scale, shape=shape)
        return tables[key]

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: Any, spec: AttentionSpec, step: Step, layer: int
    ) -> np.ndarray:
        return self.call(
            self.machine.attention, self.plain(q), self.plain(k), self.plain(v), self.vector(sinks), native_mask(spec),
            native_step(step), self._room(step, layer), shape=(*q.shape[:3], v.shape[-1]),
        )  # fmt: skip

    def _room(self, step: Step, layer: int) -> _native.LayerRoom | None:
        if step.cache is None:
            return None
        if self.recording is None:
            step.cache.check(step)
        return step.cache.rooms[layer]

    def latent_attention(
        self, q_nope: np.ndarray, q_rope: np.ndarray, c: np.ndarray, k_rope: np.ndarray, wk: Any, wv: Any,
        spec: AttentionSpec, step: Step, layer: int,
    ) -> np.ndarray:  # fmt: skip
        """Absorbed, as in the reference; each head's values are an expert of its own."""
        rows, tokens, heads, width = *q_nope.shape[:3], c.shape[-1]
        whole = width + k_rope.shape[-1]
        q = self.call(
            self.machine.absorb, self.plain(q_nope), self.plain(q_rope), self._matrix(wk), heads,
            shape=(rows, tokens, heads, whole),
        )  # fmt: skip
        k = self.call(self.machine.join, self.plain(c), self.plain(k_rope), shape=(rows, tokens, whole))
        mixed = self.call(
            self.machine.latent_attention, q, k, native_mask(spec), native_step(step), self._room(step, layer),
            shape=(rows, tokens, heads, width),
        )  # fmt: skip
        owners = np.tile(np.arange(heads, dtype=np.int32), (rows * tokens, 1))
        y = self.expert_linear(mixed.reshape(-1, heads, width), wv, None, None, owners)
        return y.reshape(rows, tokens, heads, -1)

    # ---- mixers with a state

    def short_convolution(self, x: np.ndarray, weight: Any, bias: Any, step: Step, layer: int) -> np.ndarray:
        taps = np.ascontiguousarray(self.values(weight).T)
        states = self._states(step, layer)
        return self.call(
            self.machine.short_convolution, self.plain(x), taps, self.vector(bias), native_step(step),
            None if states is None else states.conv, shape=x.shape,
        )  # fmt: skip

    def gated_delta(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray, rate: Any, shift: Any,
        step: Step, layer: int,
    ) -> np.ndarray:  # fmt: skip
        inputs = [self.plain(x) for x in (q, k, v, a, b)]
        states = self._states(step, layer)
        return self.call(
            self.machine.gated_delta, *inputs, self.vector(rate), self.vector(shift), native_step(step),
            None if states is None else states.memory, shape=v.shape,
        )  # fmt: skip

    def _states(self, step: Step, layer: int) -> Any:
        if step.cache is None:
            return None
        if self.recording is None:
            step.cache.check(step)
        return step.cache.states[layer]

    # ---- experts

    def elect(self, logits: np.ndarray, k: int, rule: RouteRule, bias: Any = None) -> np.ndarray:
        arguments = self.vector(bias), rule.groups, rule.top_groups, SCORINGS.index(rule.scoring)
        return self.call(self.machine.elect, self.plain(logits), *arguments, shape=(len(logits), k), ids=True)

    def gates(self, logits: np.ndarray, ids: np.ndarray, rule: RouteRule) -> np.ndarray:
        arguments = SCORINGS.index(rule.scoring), rule.jitter, rule.renormalise, rule.scale
        return self.call(self.machine.gates, self.plain(logits), ids, *arguments, shape=ids.shape)

    def expert_linear(
        self, x: np.ndarray, weight: Any, bias: Any, gates: np.ndarray | None, ids: np.ndarray
    ) -> np.ndarray:
        experts, outputs, _ = weight.shape
        return self.call(
            self.machine.expert_linear, self.plain(x), self._matrix(weight), self.vector(bias), gates, ids, experts,
            self.exact or self.differentiating, shape=(*ids.shape, outputs),
        )  # fmt: skip

    def combine(self, y: np.ndarray, gates: np.ndarray | None) -> np.ndarray:
        return self.call(self.machine.combine, self.plain(y), gates, shape=(len(y), y.shape[-1]))

    # ---- sampling

    def sample(
        self, logits: np.ndarray, params: Sequence[SamplingParams], u: np.ndarray, counts: Any, mask: Any
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:
        self.eager("sampling")
        return sampling.sample(logits, params, u, counts, mask, self._draw)

    def _draw(self, scores: np.ndarray, p: SamplingParams, u: float) -> int:
        return self.machine.draw(self.plain(scores), p.temperature, p.top_k, p.top_p, p.min_p, u)
