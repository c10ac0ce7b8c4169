"""Keys and values as the attention kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...tensors import STORAGE
from ..base import Cache, LayerCache, StateCache
from ..reference import HostStates, attention_part
from . import _native

PANEL = 16  # keys that a query meets at a time


class CpuCache(Cache):
    """By layer: keys [slots, K, capacity / 16, d, 16], sixteen tokens to a panel, and values [slots, K, capacity, dv],
    dv rounded up to 16 (0: latents, which are read as both); with int8, scales [slots, K, capacity, 1] of both. Zeroed
    by the system page by page on first use. `truncate` goes back to any length."""

    def __init__(self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: str):
        panels = -(-capacity // PANEL)
        self.capacity, self.slots, self.dtype = capacity, slots, dtype
        self.lengths = np.zeros(slots, np.int32)
        self.recurrent = any(isinstance(spec, StateCache) for spec in specs)
        self.states = [HostStates.of(spec, slots) for spec in specs]
        specs = [attention_part(spec) for spec in specs]
        self.keys = [_zeros((slots, s.kv_heads, panels, s.key_dim, PANEL), dtype) for s in specs]
        self.values = [_zeros((slots, s.kv_heads, panels * PANEL, _whole(s.value_dim)), dtype) for s in specs]
        scaled = int(dtype == "int8")
        self.scales = [
            tuple(_zeros((slots, s.kv_heads, panels * PANEL, scaled), "float32") for _ in range(2)) for s in specs
        ]
        self.rooms = [
            _native.LayerRoom(k, v, dtype, capacity, *(scales if scaled else ())) if k.size else None
            for k, v, scales in zip(self.keys, self.values, self.scales, strict=True)
        ]

    def snapshot(self, slot: int) -> Any:
        n = int(self.lengths[slot])
        panels = -(-n // PANEL)
        keys = [part[slot, :, :panels].copy() for part in self.keys]
        states = [layer.slot(slot).copy() for layer in self.states]
        return n, keys, [part[slot, :, :n].copy() for part in self._rows], states

    def restore(self, slot: int, state: Any) -> None:
        n, keys, values, states = state
        for layer, kept in zip(self.states, states, strict=True):
            layer.slot(slot).set(kept)
        for kept, part in zip(self.keys, keys, strict=True):
            kept[slot, :, : part.shape[1]] = part
        for kept, part in zip(self._rows, values, strict=True):
            kept[slot, :, :n] = part
        self.lengths[slot] = n

    @property
    def _rows(self) -> tuple[np.ndarray, ...]:
        """What has a row for each token."""
        return (*self.values, *(scales for pair in self.scales for scales in pair))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self._rows, *self.states))


def _whole(width: int) -> int:
    return -(-width // PANEL) * PANEL


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros at an address that is a multiple of 64: no vector crosses a cache line."""
    kind = STORAGE[dtype]
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    octets = np.zeros(size + 64, np.uint8)
    skip = -octets.ctypes.data % 64
    return octets[skip : skip + size].view(kind).reshape(shape)
