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
BACK = 256  # tokens by which a text may always be shortened, however far behind them a window begins
AHEAD = 512 + PANEL  # places behind what is kept: room is made once in so many tokens, and a prompt's piece fits


class CpuCache(Cache):
    """By layer: keys [slots, K, places / 16, d, 16], sixteen tokens to a panel, and values [slots, K, places, dv],
    dv rounded up to 16 (0: latents, which are read as both); with int8, scales [slots, K, places, 1] of both. Zeroed
    by the system page by page on first use.

    A layer has a place for each token of the capacity; one with a window has fewer, and when they are used up, the
    kernel moves what is still needed to the front: `bases[layer][slot]` is the position of the first place then.
    `truncate` goes back to any length whose window is still held, else to 0."""

    def __init__(self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: str):
        self.capacity, self.slots, self.dtype = capacity, slots, dtype
        self.lengths = np.zeros(slots, np.int32)
        self.recurrent = any(isinstance(spec, StateCache) for spec in specs)
        self.states = [HostStates.of(spec, slots) for spec in specs]
        self.specs = [attention_part(spec) for spec in specs]
        self.keys, self.values, self.scales, self.bases, self.rooms = [], [], [], [], []
        for spec in self.specs:
            self._add(spec, _places(spec, capacity))

    def _add(self, spec: LayerCache, places: int) -> None:
        scaled, heads = int(self.dtype == "int8"), (self.slots, spec.kv_heads)
        keys = _zeros((*heads, places // PANEL, spec.key_dim, PANEL), self.dtype)
        values = _zeros((*heads, places, _whole(spec.value_dim)), self.dtype)
        scales = tuple(_zeros((*heads, places, scaled), "float32") for _ in range(2))
        bases = np.zeros(self.slots, np.int32)
        moving = (bases, spec.window + BACK if places < self.capacity else 0) if _windowed(spec) else (None, 0)
        room = _native.LayerRoom(keys, values, self.dtype, places, *(scales if scaled else (None, None)), *moving)
        self.keys.append(keys)
        self.values.append(values)
        self.scales.append(scales)
        self.bases.append(bases)
        self.rooms.append(room if keys.size else None)

    def truncate(self, slot: int, length: int) -> int:
        if length < self.lengths[slot]:
            lost = any(
                bases[slot] > max(length - spec.window + 1, 0)  # what the next token sees first
                for spec, bases in zip(self.specs, self.bases, strict=True)
                if _windowed(spec)
            )
            super().truncate(slot, 0 if lost else length)
        if not self.lengths[slot]:
            for bases in self.bases:
                bases[slot] = 0
        return int(self.lengths[slot])

    def snapshot(self, slot: int) -> Any:
        held = [int(self.lengths[slot] - bases[slot]) for bases in self.bases]
        layers = [
            [part[slot, :, :count].copy() for part, count in zip(parts, _counts(n), strict=True)]
            for n, parts in zip(held, self._layers, strict=True)
        ]
        states = [layer.slot(slot).copy() for layer in self.states]
        return int(self.lengths[slot]), [int(bases[slot]) for bases in self.bases], layers, states

    def restore(self, slot: int, state: Any) -> None:
        self.lengths[slot], bases, layers, states = state
        for layer, kept in zip(self.states, states, strict=True):
            layer.slot(slot).set(kept)
        for ours, base in zip(self.bases, bases, strict=True):
            ours[slot] = base
        for parts, kept in zip(self._layers, layers, strict=True):
            for part, copy in zip(parts, kept, strict=True):
                part[slot, :, : copy.shape[1]] = copy

    @property
    def _layers(self) -> list[tuple[np.ndarray, ...]]:
        """Each one's arrays: the panels of keys, then what has a row for each token."""
        return [(k, v, *scales) for k, v, scales in zip(self.keys, self.values, self.scales, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self._layers for part in parts) + sum(s.nbytes for s in self.states)

    def nbytes_of(self, capacity: int) -> int:
        grown = sum(
            sum(part.nbytes for part in parts) * _places(spec, capacity) // _places(spec, self.capacity)
            for spec, parts in zip(self.specs, self._layers, strict=True)
        )
        return grown + sum(state.nbytes for state in self.states)


def _places(spec: LayerCache, capacity: int) -> int:
    """So many tokens have a place in such a layer; a multiple of 16."""
    return max(_whole(min(capacity, spec.window + BACK + AHEAD) if _windowed(spec) else capacity), PANEL)


def _windowed(spec: LayerCache) -> bool:
    return bool(spec.window and spec.value_dim)  # latents are few: they all stay


def _counts(tokens: int) -> tuple[int, ...]:
    """Of what a layer's arrays hold of so many tokens: panels, and rows."""
    return -(-tokens // PANEL), tokens, tokens, tokens


def _whole(width: int) -> int:
    return -(-width // PANEL) * PANEL


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros at an address that is a multiple of 64: no vector crosses a cache line."""
    kind = STORAGE[dtype]
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    octets = np.zeros(size + 64, np.uint8)
    skip = -octets.ctypes.data % 64
    return octets[skip : skip + size].view(kind).reshape(shape)
