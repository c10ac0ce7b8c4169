"""Keys and values as the attention kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import BadOption, ContextFull
from ...tensors import STORAGE, floats, store
from ..base import Cache, LayerCache, Step
from . import _native

PANEL = 16  # keys that a query meets at a time


class CpuCache(Cache):
    """By layer: keys [slots, K, capacity / 16, d, 16], sixteen tokens to a panel, and values [slots, K, capacity, dv],
    dv rounded up to 16. Zeroed by the system page by page on first use. `truncate` goes back to any length."""

    def __init__(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: str):
        if dtype not in ("float32", "float16", "bfloat16"):
            raise BadOption(f"The cache cannot be kept in {dtype!r}.", "Choose float32, float16 or bfloat16.")
        panels = -(-capacity // PANEL)
        self.capacity, self.slots, self.dtype = capacity, slots, dtype
        self.lengths = np.zeros(slots, np.int32)
        self.specs = tuple(specs)
        self.keys = [_zeros((slots, s.kv_heads, panels, s.key_dim, PANEL), dtype) for s in specs]
        self.values = [_zeros((slots, s.kv_heads, panels * PANEL, _whole(s.value_dim)), dtype) for s in specs]
        self.rooms = [_native.LayerRoom(k, v, dtype, capacity) for k, v in zip(self.keys, self.values, strict=True)]

    def check(self, step: Step) -> None:
        """Raises ContextFull, or BadOption for a slot that isn't there."""
        for start, length, slot in zip(step.starts.tolist(), step.lengths.tolist(), step.slots.tolist(), strict=True):
            if start + length > self.capacity:
                raise ContextFull(
                    f"{start + length} tokens do not fit in a cache of {self.capacity}.",
                    "Shorten the prompt or raise the context.",
                )
            if not 0 <= slot < self.slots or start < 0:
                raise BadOption(f"A cache of {self.slots} slots has no place {start} of slot {slot}.")

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
        return n, keys, [part[slot, :, :n].copy() for part in self.values]

    def restore(self, slot: int, state: Any) -> None:
        n, keys, values = state
        for kept, part in zip(self.keys, keys, strict=True):
            kept[slot, :, : part.shape[1]] = part
        for kept, part in zip(self.values, values, strict=True):
            kept[slot, :, :n] = part
        self.lengths[slot] = n

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values))


def _whole(width: int) -> int:
    return -(-width // PANEL) * PANEL


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros at an address that is a multiple of 64: no vector crosses a cache line."""
    kind = STORAGE[dtype]
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    octets = np.zeros(size + 64, np.uint8)
    skip = -octets.ctypes.data % 64
    return octets[skip : skip + size].view(kind).reshape(shape)
