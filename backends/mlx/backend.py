"""The contract on MLX: Metal on a Mac; CPU or CUDA on Linux.

MLX is lazy: an operation adds to a graph, and the graph runs when somebody waits (`numpy`) or when `sample` starts it
without waiting, once a token. Its fast operations do the work; nothing here computes what they can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read once, by MLX's first product: float32 has to mean float32

import mlx.core as mx
import numpy as np

from ...errors import BadOption, Unsupported
from ...registry import did_you_mean
from ...tensors import Tensor
from ..base import (
    FEATURES,
    AttentionSpec,
    Backend,
    Footprint,
    Info,
    LayerCache,
    Sampled,
    SamplingParams,
    Step,
    cache_dtype,
    keeps_float32,
)
from ..places import CAUSAL, causal
from . import sampling
from .attention import Heads, MlxCache, MlxPlaces, heads_first, plain, softcapped
from .experts import MlxExperts
from .recurrence import MlxRecurrence
from .training import MlxTraining
from .weights import DenseWeight, PackedWeight, Weight, footprint, prepare

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
KEPT = DTYPES | {"int8": mx.int8}  # of a cache

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": lambda x: x * mx.sigmoid(x),
    "gelu": lambda x: x * (1 + mx.erf(x * 0.5**0.5)) * 0.5,
    "gelu_tanh": lambda x: 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
    "clamp": lambda x: mx.clip(x, -7, 7),
    "clamped_swish": lambda x: mx.minimum(x, 7) * mx.sigmoid(1.702 * mx.minimum(x, 7)),
}


@cache
def _activation(kind: str, fused: bool) -> Callable[[mx.array], mx.array]:
    if kind not in ACTIVATIONS:
        raise Unsupported(f"There is no activation named {kind!r}.", did_you_mean(kind, ACTIVATIONS))
    return mx.compile(ACTIVATIONS[kind], shapeless=True) if fused else ACTIVATIONS[kind]


@cache
def _gate(kind: str, fused: bool) -> Callable[[mx.array, mx.array], mx.array]:
    function = _activation(kind, False)

    def gate(gate: mx.array, up: mx.array) -> mx.array:
        return function(gate) * up

    return mx.compile(gate, shapeless=True) if fused else gate


class MlxBackend(MlxExperts, MlxRecurrence, MlxTraining, Backend):
    """dtype: of activations and cache. fused: elementwise functions through mx.compile, one kernel each; on the CPU
    that calls a C++ compiler for each function, so there it is off."""

    name = "mlx"
    features = frozenset(FEATURES) - {"compile", "burst"}
    asynchronous = True

    def __init__(self, dtype: str, exact: bool, fused: bool):
        self.dtype, self.exact, self.fused = DTYPES[dtype], exact, fused
        self._places: MlxPlaces | None = None  # of the step that passes through the layers just now
        self._turns: dict[int, tuple[np.ndarray, mx.array]] = {}

    def info(self) -> Info:
        device = mx.device_info().get("device_name", "unknown")
        place = (
            f"{device}, {'Metal' if mx.metal.is_available() else mx.default_device().type.name} (MLX {mx.__version__})"
        )
        return Info(self.name, place, _name(self.dtype), self.exact, self.features)

    # ---- life and transfer

    def prepare(self, tensor: Tensor) -> Weight:
        return prepare(tensor, self.dtype)

    def footprint(self, tensor: Tensor) -> Footprint:
        return Footprint(footprint(tensor, self.dtype))

    def device_memory(self) -> int | None:
        """What Metal lets one process hold at once, which is less than the machine has."""
        return mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None

    def weight(self, w: Any) -> Weight:
        """What `prepare` returned, or an array in its place."""
        return w if isinstance(w, DenseWeight | PackedWeight) else DenseWeight(plain(w).astype(self.dtype))

    def vector(self, w: Any) -> mx.array | None:
        return None if w is None else self.weight(w).numbers()

    def release(self, weight: Weight) -> None:
        weight.clear()

    def array(self, values: np.ndarray, dtype: str | None = None) -> mx.array:
        kept, values = keeps_float32(dtype), np.asarray(values)
        if values.dtype.kind != "f":
            return mx.array(values.astype(np.int32))
        return mx.array(values.astype(np.float32)).astype(mx.float32 if kept else self.dtype)

    def numpy(self, a: Any) -> np.ndarray:
        a = plain(a)
        floating = mx.issubdtype(a.dtype, mx.floating)
        return np.array(a.astype(mx.float32 if floating else mx.int32))

    def zeros(self, shape: Sequence[int]) -> mx.array:
        return mx.zeros(tuple(shape), self.dtype)

    def sync(self) -> None:
        mx.synchronize()

    def dequantize(self, weight: Any) -> mx.array:
        numbers = weight.numbers() if isinstance(weight, DenseWeight | PackedWeight) else plain(weight)
        return numbers.astype(mx.float32)

    # ---- forward

    def embed(self, weight: Any, ids: mx.array) -> mx.array:
        return self.weight(weight).rows(ids)

    def linear(self, x: Any, weight: Any, bias: Any = None) -> mx.array:
        return self.weight(weight).apply(plain(x), self.vector(bias))

    def rms_norm(self, x: Any, gain: Any, eps: float, offset: float = 0.0) -> mx.array:
        x, gain = plain(x), None if gain is None else self.weight(gain).shifted(offset)
        if gain is None or gain.size == x.shape[-1]:
            return mx.fast.rms_norm(x, gain, eps)
        return mx.fast.rms_norm(x, None, eps) * gain.reshape(-1, x.shape[-1]).astype(x.dtype)

    def layer_norm(self, x: Any, gain: Any, bias: Any, eps: float) -> mx.array:
        x, gain, bias = plain(x), self.vector(gain), self.vector(bias)
        if gain is None or gain.size == x.shape[-1]:
            return mx.fast.layer_norm(x, gain, bias, eps)
        y = mx.fast.layer_norm(x, None, None, eps) * gain.reshape(-1, x.shape[-1]).astype(x.dtype)
        return y if bias is None else y + bias

    def rope(self, x: Any, step: Step, freqs: np.ndarray, interleaved: bool = False, scale: float = 1.0) -> Heads:
        x, dims = heads_first(x), 2 * freqs.shape[0]
        turned = mx.fast.rope(
            x, dims, traditional=interleaved, base=None, scale=1.0, freqs=self._wavelengths(freqs),
            offset=self._where(step, x.shape[2]).offset,
        )  # fmt: skip
        if scale == 1.0:
            return Heads(turned)
        return Heads(mx.concatenate([turned[..., :dims] * scale, turned[..., dims:]], axis=-1))

    def act(self, x: Any, kind: str) -> mx.array:
        return _activation(kind, self.fused)(plain(x))

    def gated(self, gate: Any, up: Any, kind: str) -> mx.array:
        return _gate(kind, self.fused)(plain(gate), plain(up))

    def softcap(self, x: Any, cap: float) -> mx.array:
        return mx.tanh(plain(x) / cap) * cap

    def take(self, x: Any, rows: np.ndarray) -> mx.array:
        return plain(x)[mx.array(rows)]

    def split(self, x: Any, sizes: Sequence[int]) -> tuple[mx.array, ...]:
        return tuple(mx.split(plain(x), np.cumsum(sizes)[:-1].tolist(), axis=-1))

    # ---- attention

    def new_cache(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: str | None = None) -> MlxCache:
        kept = self.dtype if dtype is None else KEPT[cache_dtype(dtype, self.features)]
        return MlxCache(specs, slots, capacity, kept)

    def attention(self, q: Any, k: Any, v: Any, sinks: Any, spec: AttentionSpec, step: Step, layer: int) -> mx.array:
        q, k, v = heads_first(q), heads_first(k), heads_first(v)
        places, first = self._where(step, q.shape[2]), 0
        if step.cache is not None:
            step.cache.write(layer, places, k, v)
            first = places.first_seen(spec)
            k, v = step.cache.read(layer, places, first, q.dtype)
        return self._attend(q, k, v, self.vector(sinks), spec, places, first).swapaxes(1, 2)

    def latent_attention(
        self,
        q_nope: Any,
        q_rope: Any,
        c: Any,
        k_rope: Any,
        wk: Any,
        wv: Any,
        spec: AttentionSpec,
        step: Step,
        layer: int,
    ) -> mx.array:
        """Absorbed: a query meets the latent itself, and what it takes of the latents is expanded once."""
        wk, wv, c = self.weight(wk).numbers(), self.weight(wv).numbers(), plain(c)
        q = mx.concatenate([heads_first(q_nope) @ wk, heads_first(q_rope)], axis=-1)  # [B, H, T, L + r]
        k = mx.concatenate([c, plain(k_rope)], axis=-1)[:, None]
        places, first = self._where(step, q.shape[2]), 0
        if step.cache is not None:
            step.cache.write(layer, places, k)
            first = places.first_seen(spec)
            (k,) = step.cache.read(layer, places, first, q.dtype)
        mixed = self._attend(q, k, k[..., : c.shape[-1]], None, spec, places, first)
        return (mixed @ wv.swapaxes(-1, -2)).swapaxes(1, 2)

    def _attend(
        self, q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None, spec: AttentionSpec, places: MlxPlaces,
        first: int,
    ) -> mx.array:  # fmt: skip
        """q [B, H, T, d], k [B, K, S, d], v [B, K, S, dv], the keys from position `first` on -> [B, H, T, dv]"""
        mask = places.mask(spec, first, k.shape[2])
        if spec.softcap is not None:
            mask = mx.array(causal(q.shape[2], k.shape[2])) if mask is CAUSAL else mask
            return softcapped(q, k, v, spec, mask, sinks)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=spec.scale, mask=mask, sinks=sinks)

    def _where(self, step: Step, tokens: int) -> MlxPlaces:
        """Worked out for the first layer, kept for the others."""
        if self._places is None or self._places.step is not step or self._places.tokens != tokens:
            self._places = MlxPlaces(step, tokens)
        return self._places

    def _wavelengths(self, freqs: np.ndarray) -> mx.array:
        """What MLX divides positions by; infinite for a pair that doesn't turn. Kept by identity, for models keep
        theirs; the array is kept beside it, so that its id stays its own."""
        if id(freqs) not in self._turns:
            with np.errstate(divide="ignore"):
                self._turns[id(freqs)] = freqs, mx.array(np.float32(1) / freqs)
        return self._turns[id(freqs)][1]

    # ---- sampling

    def sample(
        self, logits: Any, params: Sequence[SamplingParams], u: np.ndarray,
        counts: tuple[np.ndarray, np.ndarray] | None = None, mask: np.ndarray | None = None, launch: bool = True,
    ) -> Sampled:  # fmt: skip
        """The one place that starts the machine without waiting. launch False: only the graph, to be looked at."""
        sampled = sampling.sample(plain(logits), params, u, counts, mask)
        if launch:
            mx.async_eval(sampled.ids, *([sampled.logprobs, *sampled.top] if sampled.top else []))
        return sampled


def _name(dtype: mx.Dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def open_backend(exact: bool, threads: int | None, dtype: str | None) -> MlxBackend:
    """See `create`."""
    if threads is not None:
        raise BadOption("The mlx backend has no setting for threads.", "Leave --threads out.")
    if dtype is not None and dtype not in DTYPES:
        raise BadOption(f"The mlx backend does not compute in {dtype!r}.", did_you_mean(dtype, DTYPES))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if on_cpu and dtype not in (None, "float32"):
        raise BadOption(f"MLX's CPU build would sum in {dtype} as well.", "On the CPU, use float32.")
    if mx.metal.is_available():  # as mlx-lm does: a large model's pages stay put between tokens
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    usual = "float32" if on_cpu else "bfloat16"
    return MlxBackend("float32" if exact else dtype or usual, exact, fused=not on_cpu)
