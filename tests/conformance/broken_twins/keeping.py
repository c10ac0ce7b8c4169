"""Caches that keep too much, too little, or the wrong thing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends.numerics import visible
from ondevice.backends.reference import HostCache, NumpyKernels

from . import twin


@twin("attention")
class PaddingIsWritten(NumpyKernels):
    """All T places are written, moved back where they would not fit (as a clamped update does)."""

    def context(self, k, v, spec, step, layer, row):
        if step.cache is not None:
            start = min(int(step.starts[row]), step.cache.capacity - k.shape[1])
            step.cache.write(layer, int(step.slots[row]), start, k[row], v[row])
            end = int(step.starts[row]) + int(step.lengths[row])
            keys, values = step.cache.read(layer, int(step.slots[row]), end)
            return keys, values, visible(np.arange(end - int(step.lengths[row]), end), np.arange(end), spec)
        return super().context(k, v, spec, step, layer, row)


@twin("attention")
class IdleRowsWrite(NumpyKernels):
    """A row of no tokens still writes its first."""

    def context(self, k, v, spec, step, layer, row):
        if step.cache is not None and step.lengths[row] == 0:
            step.cache.write(layer, int(step.slots[row]), int(step.starts[row]), k[row, :1], v[row, :1])
        return super().context(k, v, spec, step, layer, row)


@twin("attention")
class RowsForSlots(NumpyKernels):
    def context(self, k, v, spec, step, layer, row):
        return super().context(k, v, spec, replace(step, slots=np.arange(len(step.slots))), layer, row)


@twin("attention")
class FirstLayersCacheForAll(NumpyKernels):
    def context(self, k, v, spec, step, layer, row):
        return super().context(k, v, spec, step, 0, row)


@twin("attention")
class OneStartForAllRows(NumpyKernels):
    def context(self, k, v, spec, step, layer, row):
        return super().context(k, v, spec, replace(step, starts=np.full_like(step.starts, step.starts[0])), layer, row)


@twin("attention")
class PaddingIsNotFinite(NumpyKernels):
    def attention(self, q, k, v, sinks, spec, step, layer):
        out = super().attention(q, k, v, sinks, spec, step, layer)
        for row, n in enumerate(step.lengths):
            out[row, n:] = np.nan
        return out


@twin("attention")
class Appends(HostCache):
    """Counts on its own and never hears of `truncate` or `reset`: stale keys stay in front."""

    def __init__(self, specs, slots, capacity, dtype):
        super().__init__(specs, slots, 3 * capacity, dtype)
        self.ends = np.zeros((len(specs), slots), int)

    def write(self, layer, slot, start, keys, values):
        super().write(layer, slot, self.ends[layer, slot], keys, values)
        self.ends[layer, slot] += len(keys)

    def read(self, layer, slot, end):
        last = self.ends[layer, slot]
        return tuple(part[:, last - end : last] for part in super().read(layer, slot, last))


@twin("attention")
class TruncateForgetsTheLength(HostCache):
    def truncate(self, slot, length):
        return min(length, int(self.lengths[slot]))


@twin("attention")
class TruncateGrows(HostCache):
    def truncate(self, slot, length):
        self.lengths[slot] = length
        return length


@twin("attention")
class FirstWriteWins(HostCache):
    """What is there already is not written again: right until somebody goes back."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ends: dict = {}

    def write(self, layer, slot, start, keys, values):
        skip = max(0, self.ends.get((layer, slot), 0) - start)
        if skip < len(keys):
            super().write(layer, slot, start + skip, keys[skip:], values[skip:])
            self.ends[layer, slot] = start + len(keys)


@twin("attention")
class RingThatCannotGoBack(HostCache):
    """Keeps only the window's keys, yet says that it went back to any length."""

    def write(self, layer, slot, start, keys, values):
        super().write(layer, slot, start, keys, values)
        window = self.specs[layer].window
        if window is not None:
            gone = max(0, start - window + 1)
            self.keys[layer][slot, :, :gone] = 0.0
            self.values[layer][slot, :, :gone] = 0.0


@twin("attention")
class SnapshotSharesMemory(HostCache):
    def snapshot(self, slot):
        n = int(self.lengths[slot])
        return n, [part[slot, :, :n] for part in (*self.keys, *self.values)]


@twin("attention")
class RestoreForgetsTheLength(HostCache):
    def restore(self, slot, state):
        super().restore(slot, state)
        self.lengths[slot] = 0


@twin("attention")
class SnapshotOfTheFirstSlot(HostCache):
    def snapshot(self, slot):
        return int(self.lengths[slot]), super().snapshot(0)[1]

    def restore(self, slot, state):
        super().restore(slot, (state[1][0].shape[1], state[1]))
        self.lengths[slot] = state[0]


@twin("attention")
class BytesThatDoNotGrow(HostCache):
    def nbytes_of(self, capacity):
        return self.nbytes


@twin("attention")
class SecretlyHalf(HostCache):
    """float16, whatever was asked for."""

    def __init__(self, specs, slots, capacity, dtype):
        super().__init__(specs, slots, capacity, "float16")


@twin("attention")
class WritesPastTheEnd(HostCache):
    """No check of the capacity: the last tokens fall on the floor."""

    def write(self, layer, slot, start, keys, values):
        room = max(0, self.capacity - start)
        super().write(layer, slot, start, keys[:room], values[:room])

    def read(self, layer, slot, end):
        keys, values = super().read(layer, slot, end)
        missing = ((0, 0), (0, end - keys.shape[1]), (0, 0))
        return np.pad(keys, missing), np.pad(values, missing)


@twin("attention")
class AnyTypeIsFloat32(HostCache):
    def __init__(self, specs, slots, capacity, dtype):
        super().__init__(specs, slots, capacity, dtype if dtype in ("float16", "bfloat16") else "float32")


@twin("attention")
class OneScaleForAllHeads(HostCache):
    """In int8 the loudest head of a token sets the scale for its others."""

    def write(self, layer, slot, start, keys, values):
        if self.dtype == "int8":
            peaks = [np.abs(x).max(axis=(1, 2), keepdims=True) for x in (keys, values)]
            noise = [np.rint(x / (p / 127)) * (p / 127) for x, p in zip((keys, values), peaks, strict=True)]
            return super().write(layer, slot, start, *noise)
        super().write(layer, slot, start, keys, values)


@twin("attention")
class RestoreForgetsTheScales(HostCache):
    def snapshot(self, slot):
        n, parts, states = super().snapshot(slot)
        return n, [*parts[: 2 * len(self.keys)], *(part * 0 for part in parts[2 * len(self.keys) :])], states


@twin("attention")
class EightBitsAreSixteen(HostCache):
    def __init__(self, specs, slots, capacity, dtype):
        super().__init__(specs, slots, capacity, "float16" if dtype == "int8" else dtype)
