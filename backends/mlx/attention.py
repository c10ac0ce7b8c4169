"""Attention on MLX: the cache, who sees whom, and arrays that keep their heads first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ..base import AttentionSpec, Cache, LayerCache, StateCache
from ..places import Places

CHUNK = 256  # tokens by which a cache grows


class Heads:
    """An array [B, T, H, d] that lies as [B, H, T, d], the order in which MLX turns and attends.

    `rope` returns it, so that `attention` need not transpose again: at one token a step that would be a fifth of all
    primitives. Everything else sees the ordinary array.
    """

    __slots__ = ("first",)

    def __init__(self, first: mx.array):
        self.first = first

    @property
    def array(self) -> mx.array:
        return self.first.swapaxes(1, 2)

    @property
    def shape(self) -> tuple[int, ...]:
        b, h, t, d = self.first.shape
        return b, t, h, d

    def reshape(self, *shape: int) -> mx.array:
        return self.array.reshape(*shape)

    def __add__(self, other: Any) -> mx.array:
        return self.array + plain(other)

    def __mul__(self, other: Any) -> mx.array:
        return self.array * plain(other)

    __radd__ = __add__
    __rmul__ = __mul__


def plain(x: Any) -> Any:
    return x.array if type(x) is Heads else x


def heads_first(x: Any) -> mx.array:
    """[B, T, H, d] -> [B, H, T, d]"""
    return x.first if type(x) is Heads else x.swapaxes(1, 2)


class MlxPlaces(Places):
    """Places as MLX arrays, each made when first asked for."""

    @cached_property
    def offset(self) -> int | mx.array:
        """Where the rows start."""
        return self.start if self.together else mx.array(self.step.starts)

    @cached_property
    def scattered(self) -> tuple[mx.array, ...]:
        return tuple(mx.array(part.astype(np.int32)) for part in self.real_tokens())

    @cached_property
    def _masks(self) -> dict[tuple, mx.array | str | None]:
        return {}

    def mask(self, spec: AttentionSpec, first: int, keys: int) -> mx.array | str | None:
        """`seen`, once for all layers alike."""
        key = spec.window, spec.chunk, first, keys
        if key not in self._masks:
            seen = self.seen(spec, first, keys)
            self._masks[key] = mx.array(seen) if isinstance(seen, np.ndarray) else seen
        return self._masks[key]


class MlxCache(Cache):
    """Keys and values by layer, [slots, K, room, d]; room grows by CHUNK up to the capacity; in int8 each with its
    scales behind it, [slots, K, room, 1]. States (conv, memory) by
    layer, [slots, …]. No ring: `truncate` goes back to any length, or to 0 where there are states."""

    def __init__(self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: mx.Dtype):
        self.capacity = capacity
        self.recurrent = any(isinstance(spec, StateCache) for spec in specs)
        self.lengths = np.zeros(slots, np.int32)

        def room(spec: LayerCache | StateCache) -> list[mx.array]:
            widths = () if isinstance(spec, StateCache) else (spec.key_dim, spec.value_dim)
            kinds = {dtype: None} if dtype != mx.int8 else {mx.int8: None, mx.float32: 1}
            return [
                mx.zeros((slots, spec.kv_heads, 0, one or width), kind)
                for width in widths if width for kind, one in kinds.items()
            ]  # fmt: skip

        def states(spec: LayerCache | StateCache) -> list[mx.array]:
            shapes = (spec.conv, spec.memory) if isinstance(spec, StateCache) else ()
            return [mx.zeros((slots, *(shape or (0,)))) for shape in shapes]

        self.layers = [room(spec) for spec in specs]
        self.states = [states(spec) for spec in specs]

    def write(self, layer: int, places: MlxPlaces, *new: mx.array) -> None:
        """new: keys, and values unless their width is 0, [B, K, T, d]. Raises ContextFull."""
        places.check(self.capacity)
        parts = self.layers[layer]
        if len(parts) > len(new):
            new = [part for values in new for part in to_int8(values)]
        for i, values in enumerate(new):
            kept = self._grown(layer, i, places.end)
            values = values if values.dtype == kept.dtype else values.astype(kept.dtype)
            if places.even:
                kept[places.slots, :, places.start : places.end] = values
            elif places.step.lengths.any():
                row, place, slot, position = places.scattered
                kept[slot, :, position] = values[row, :, place]
            parts[i] = kept

    def _grown(self, layer: int, i: int, end: int) -> mx.array:
        kept = self.layers[layer][i]
        slots, heads, room, width = kept.shape
        if end <= room:
            return kept
        wanted = min(-(-end // CHUNK) * CHUNK, self.capacity)
        return mx.concatenate([kept, mx.zeros((slots, heads, wanted - room, width), kept.dtype)], axis=2)

    def read(self, layer: int, places: MlxPlaces, first: int, dtype: mx.Dtype) -> list[mx.array]:
        """Keys and values of the step's rows from position `first` to the step's end, [B, K, end - first, d]."""
        found = []
        for kept in self.layers[layer]:
            if places.even:
                part = kept[places.slots, :, first : places.end]
            else:
                part = kept[mx.array(places.step.slots)][:, :, first : places.end]
            found.append(part)
        if self.layers[layer][0].dtype == mx.int8:
            found = [codes * scales for codes, scales in zip(found[::2], found[1::2], strict=True)]
        return [part if part.dtype == dtype else part.astype(dtype) for part in found]

    def snapshot(self, slot: int) -> tuple:
        n = int(self.lengths[slot])
        copies = [[mx.contiguous(part[slot, :, :n]) for part in parts] for parts in self.layers]
        states = [[mx.contiguous(part[slot]) for part in parts] for parts in self.states]
        mx.eval(copies, states)
        return n, copies, states

    def restore(self, slot: int, state: tuple) -> None:
        n, copies, states = state
        for kept, parts in zip(self.states, states, strict=True):
            for part, into in zip(parts, kept, strict=True):
                into[slot] = part
        for layer, parts in enumerate(copies):
            for i, part in enumerate(parts):
                kept = self._grown(layer, i, n)
                kept[slot, :, :n] = part
                self.layers[layer][i] = kept
        self.lengths[slot] = n

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in (*self.layers, *self.states) for part in parts)


def to_int8(x: mx.array) -> tuple[mx.array, mx.array]:
    """x [..., d] as an int8 cache keeps it: codes, and scales [..., 1] float32."""
    x = x.astype(mx.float32)
    scales = mx.abs(x).max(axis=-1, keepdims=True) / 127
    return mx.round(x / mx.where(scales > 0, scales, 1.0)).astype(mx.int8), scales


def softcapped(
    q: mx.array, k: mx.array, v: mx.array, spec: AttentionSpec, mask: mx.array | None, sinks: mx.array | None
) -> mx.array:
    """What `scaled_dot_product_attention` can't do: scores through a softcap. q [B, H, T, d] -> [B, H, T, dv]"""
    (b, heads, tokens, d), kv_heads = q.shape, k.shape[1]
    grouped = (q * spec.scale).reshape(b, kv_heads, heads // kv_heads, tokens, d)
    scores = (grouped @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    scores = mx.tanh(scores / spec.softcap) * spec.softcap
    if mask is not None:
        scores = mx.where(mask[:, :, None], scores, -mx.inf)
    if sinks is not None:
        last = sinks.astype(mx.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = mx.concatenate([scores, mx.broadcast_to(last, (*scores.shape[:-1], 1))], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., : k.shape[2]].astype(v.dtype)
    return (weights @ v[:, :, None]).reshape(b, heads, tokens, -1)
