"""Attention on MLX: the cache, who sees whom, and arrays that keep their heads first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import ContextFull, Unsupported
from ..base import AttentionSpec, Cache, LayerCache, Step
from ..numerics import visible

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


class Places:
    """A Step as all layers use it, worked out once: where rows are written, and what their queries see.

    even: full rows, side by side in the cache, at one position; then a slice does for reading and writing.
    """

    def __init__(self, step: Step, tokens: int):
        self.step, self.tokens, self.rows = step, tokens, len(step.starts)
        self.ends = step.starts + step.lengths
        self.end = max(int(self.ends.max(initial=0)), 1)
        self.start = int(step.starts[0])
        self.slot = int(step.slots[0])
        self.together = bool((step.starts == self.start).all())
        side_by_side = bool((step.slots == self.slot + np.arange(self.rows)).all())
        self.full = bool((step.lengths == tokens).all())
        self.even = self.together and self.full and side_by_side
        self.offset = self.start if self.together else mx.array(step.starts)
        self._masks: dict[tuple, Any] = {}
        self._scattered: tuple[mx.array, ...] | None = None

    def of_real_tokens(self) -> tuple[mx.array, ...]:
        """Of every token that is no padding: its row, its place in the row, its slot and its position."""
        if self._scattered is None:
            row, place = np.nonzero(np.arange(self.tokens) < self.step.lengths[:, None])
            where = row, place, self.step.slots[row], self.step.starts[row] + place
            self._scattered = tuple(mx.array(w.astype(np.int32)) for w in where)
        return self._scattered

    def first_seen(self, spec: AttentionSpec) -> int:
        """The first position that a query of an even step sees: what lies before need not be read."""
        by_window = 0 if spec.window is None else self.start - spec.window + 1
        by_chunk = 0 if spec.chunk is None else self.start // spec.chunk * spec.chunk
        return max(0, by_window, by_chunk)

    def mask(self, spec: AttentionSpec, first: int, keys: int) -> mx.array | str | None:
        """For keys from position `first` on (without a cache: the rows themselves): None when all is seen, "causal",
        or bool [B or 1, 1, T, keys]."""
        cached = self.step.cache is not None
        if self.tokens == 1 and (self.even or not cached):
            return None
        key = (spec.window, spec.chunk, first, keys)
        if key not in self._masks:
            simple = self._causal(spec, first) if cached or spec.chunk is None else False
            self._masks[key] = "causal" if simple else mx.array(self._seen(spec, first, keys))
        return self._masks[key]

    def boolean(self, mask: mx.array | str | None, keys: int) -> mx.array | None:
        """ "causal" written out."""
        if not isinstance(mask, str):
            return mask
        return mx.array(np.tri(self.tokens, keys, keys - self.tokens, dtype=bool))[None, None]

    def _causal(self, spec: AttentionSpec, first: int) -> bool:
        """Does each query see just everything up to itself?"""
        if self.step.cache is None:
            return self.step.segments is None and (spec.window is None or self.tokens <= spec.window)
        one_chunk = spec.chunk is None or first // spec.chunk == (self.end - 1) // spec.chunk
        return self.even and one_chunk and (spec.window is None or self.end - first <= spec.window)

    def _seen(self, spec: AttentionSpec, first: int, keys: int) -> np.ndarray:
        step = self.step
        alike = self.even and step.segments is None
        rows = [self._row_seen(spec, row, first, keys) for row in range(1 if alike else self.rows)]
        return np.stack(rows)[:, None]

    def _row_seen(self, spec: AttentionSpec, row: int, first: int, keys: int) -> np.ndarray:
        """bool [T, keys]. Padding sees everything: what comes of it counts for nothing, but must be finite."""
        step, queries = self.step, self.step.starts[row] + np.arange(self.tokens)
        where = queries if step.cache is None else first + np.arange(keys)
        segments = None if step.segments is None else (step.segments[row], step.segments[row])
        seen = visible(queries, where, spec, segments)
        seen[step.lengths[row] :] = True
        return seen


class MlxCache(Cache):
    """Keys and values by layer, [slots, K, room, d]; room grows by CHUNK up to the capacity. No ring: `truncate` goes
    back to any length."""

    def __init__(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: mx.Dtype):
        self.capacity = capacity
        self.lengths = np.zeros(slots, np.int32)
        self.layers = [
            [mx.zeros((slots, spec.kv_heads, 0, width), dtype) for width in (spec.key_dim, spec.value_dim) if width]
            for spec in specs
        ]

    def write(self, layer: int, places: Places, *new: mx.array) -> None:
        """new: keys, and values unless their width is 0, [B, K, T, d]. Raises ContextFull."""
        if places.step.segments is not None:
            raise Unsupported("Packed segments and a cache exclude each other.", "Give each document its own row.")
        if places.end > self.capacity:
            raise ContextFull(
                f"{places.end} tokens do not fit in a cache of {self.capacity}.",
                "Shorten the prompt or raise the context.",
            )
        for i, values in enumerate(new):
            kept = self._grown(layer, i, places.end)
            values = values if values.dtype == kept.dtype else values.astype(kept.dtype)
            if places.even:
                kept[places.slot : places.slot + places.rows, :, places.start : places.end] = values
            elif places.step.lengths.any():
                row, place, slot, position = places.of_real_tokens()
                kept[slot, :, position] = values[row, :, place]
            self.layers[layer][i] = kept

    def _grown(self, layer: int, i: int, end: int) -> mx.array:
        kept = self.layers[layer][i]
        slots, heads, room, width = kept.shape
        if end <= room:
            return kept
        wanted = min(-(-end // CHUNK) * CHUNK, self.capacity)
        return mx.concatenate([kept, mx.zeros((slots, heads, wanted - room, width), kept.dtype)], axis=2)

    def read(self, layer: int, places: Places, first: int, dtype: mx.Dtype) -> list[mx.array]:
        """Keys and values of the step's rows from position `first` to the step's end, [B, K, end - first, d]."""
        found = []
        for kept in self.layers[layer]:
            if places.even:
                part = kept[places.slot : places.slot + places.rows, :, first : places.end]
            else:
                part = kept[mx.array(places.step.slots)][:, :, first : places.end]
            found.append(part if part.dtype == dtype else part.astype(dtype))
        return found

    def snapshot(self, slot: int) -> tuple[int, list[list[mx.array]]]:
        n = int(self.lengths[slot])
        copies = [[mx.contiguous(part[slot, :, :n]) for part in parts] for parts in self.layers]
        mx.eval(copies)
        return n, copies

    def restore(self, slot: int, state: tuple[int, list[list[mx.array]]]) -> None:
        n, copies = state
        for layer, parts in enumerate(copies):
            for i, part in enumerate(parts):
                kept = self._grown(layer, i, n)
                kept[slot, :, :n] = part
                self.layers[layer][i] = kept
        self.lengths[slot] = n

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.layers for part in parts)


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
