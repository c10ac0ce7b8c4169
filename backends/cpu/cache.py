"""Keys and values as the attention kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import BadOption
from ...tensors import STORAGE, floats, store
from ..base import Cache, LayerCache, StateCache, Step
from ..reference import HostStates, attention_part
from . import _native

PANEL = 16  # keys that a query meets at a time


class CpuCache(Cache):
    """By layer: keys [slots, K, capacity / 16, d, 16], sixteen tokens to a panel, and values [slots, K, capacity, dv],
    dv rounded up to 16. Zeroed by the system page by page on first use. `truncate` goes back to any length."""

    def __init__(self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: str):
        if dtype not in ("float32", "float16", "bfloat16"):
            raise BadOption(f"The cache cannot be kept in {dtype!r}.", "Choose float32, float16 or bfloat16.")
        panels = -(-capacity // PANEL)
        self.capacity, self.slots, self.dtype = capacity, slots, dtype
        self.lengths = np.zeros(slots, np.int32)
        self.recurrent = any(isinstance(spec, StateCache) for spec in specs)
        self.states = [HostStates.of(spec, slots) for spec in specs]
        specs = [attention_part(spec) for spec in specs]
        self.specs = tuple(specs)
        self.keys = [_zeros((slots, s.kv_heads, panels, s.key_dim, PANEL), dtype) for s in specs]
        self.values = [_zeros((slots, s.kv_heads, panels * PANEL, _whole(s.value_dim)), dtype) for s in specs]
        self.rooms = [
            _native.LayerRoom(k, v, dtype, capacity) if k.size else None
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    def write(self, layer: int, slot: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """keys [n, K, d] and values [n, K, dv] to positions start …, for operations that NumPy does."""
        where = np.arange(start, start + len(keys))
        self.check(Step(*(np.array([n], np.int32) for n in (start, len(keys), slot))))
        self.keys[layer][slot][:, where // PANEL, :, where % PANEL] = store(keys, self.dtype)
        self.values[layer][slot][:, where, : values.shape[-1]] = store(values.swapaxes(0, 1), self.dtype)

    def read(self, layer: int, slot: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys [K, end, d] and values [K, end, dv] of positions 0 … end - 1."""
        spec, panels = self.specs[layer], self.keys[layer][slot, :, : -(-end // PANEL)]
        keys = panels.swapaxes(2, 3).reshape(spec.kv_heads, -1, spec.key_dim)[:, :end]
        values = self.values[layer][slot, :, :end, : spec.value_dim]
        return floats(keys, self.dtype), floats(values, self.dtype)

    def snapshot(self, slot: int) -> Any:
        n = int(self.lengths[slot])
        panels = -(-n // PANEL)
        keys = [part[slot, :, :panels].copy() for part in self.keys]
        states = [layer.slot(slot).copy() for layer in self.states]
        return n, keys, [part[slot, :, :n].copy() for part in self.values], states

    def restore(self, slot: int, state: Any) -> None:
        n, keys, values, states = state
        for layer, kept in zip(self.states, states, strict=True):
            layer.slot(slot).set(kept)
        for kept, part in zip(self.keys, keys, strict=True):
            kept[slot, :, : part.shape[1]] = part
        for kept, part in zip(self.values, values, strict=True):
            kept[slot, :, :n] = part
        self.lengths[slot] = n

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values, *self.states))


def _whole(width: int) -> int:
    return -(-width // PANEL) * PANEL


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros at an address that is a multiple of 64: no vector crosses a cache line."""
    kind = STORAGE[dtype]
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    octets = np.zeros(size + 64, np.uint8)
    skip = -octets.ctypes.data % 64
    return octets[skip : skip + size].view(kind).reshape(shape)
