"""Backends that compute well and keep the contract badly; recordings that keep too much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends.base import Footprint, Step
from ondevice.backends.reference import ReferenceBackend
from ondevice.backends.tape import Array

from . import twin

# ------------------------------------------------------------------------------------------------ the contract itself


@twin("contract")
class OtherNames(ReferenceBackend):
    def linear(self, x, w, bias=None):
        return super().linear(x, w, bias)


@twin("contract")
class OtherDefaults(ReferenceBackend):
    def rope(self, x, step, freqs, interleaved=True, scale=1.0):
        return super().rope(x, step, freqs, interleaved, scale)


@twin("contract")
class AsksForMore(ReferenceBackend):
    def softcap(self, x, cap, mode):
        return super().softcap(x, cap)


@twin("contract")
class AWordOfItsOwn(ReferenceBackend):
    features = ReferenceBackend.features | {"telepathy"}


@twin("contract")
class SaysLessThanItDoes(ReferenceBackend):
    features = ReferenceBackend.features - {"training"}


@twin("contract")
class TakesNoRoom(ReferenceBackend):
    def footprint(self, tensor):
        return Footprint(0)


@twin("contract")
class ArraysAlias(ReferenceBackend):
    def array(self, values, dtype=None):
        return Array(self, np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else np.int32))


@twin("contract")
class ZerosAreWhateverWasThere(ReferenceBackend):
    def zeros(self, shape):
        return Array(self, np.full(shape, 1e-3, np.float32))


@twin("contract")
class DoublesOnTheHost(ReferenceBackend):
    def numpy(self, a):
        return a.data.astype(np.float64) if a.data.dtype.kind == "f" else a.data


@twin("contract")
class CannotRelease(ReferenceBackend):
    def release(self, weight):
        del weight.tensor, weight.nothing


@twin("contract")
class WideIntegers(ReferenceBackend):
    def array(self, values, dtype=None):
        return Array(self, values.copy())


@twin("contract")
class RoundsWhatIsTrained(ReferenceBackend):
    def array(self, values, dtype=None):
        narrow = dtype == "float32" and values.dtype.kind == "f"
        return super().array(values.astype(np.float16) if narrow else values, dtype)


# ------------------------------------------------------------------------------------------------ compilation


class Recording(ReferenceBackend):
    """Twins that record override `frozen`: the step, given the first one."""

    def compile(self, fn, state=()):
        first: list[Step] = []

        def run(ids, step):
            first.append(step)
            return fn(*self.frozen(ids, step, first[0]))

        return run


@twin("compiled")
class StartsOfTheRecording(Recording):
    def frozen(self, ids, step, first):
        return ids, replace(step, starts=first.starts)


@twin("compiled")
class SlotsOfTheRecording(Recording):
    def frozen(self, ids, step, first):
        return ids, replace(step, slots=first.slots)


@twin("compiled")
class IdsOfTheRecording(Recording):
    def frozen(self, ids, step, first):
        self.ids = getattr(self, "ids", {})
        return self.ids.setdefault((id(first), ids.shape), ids), step


@twin("compiled")
class OneResultForAllPlans(ReferenceBackend):
    """Every plan replays the latest recording."""

    def compile(self, fn, state=()):
        self.latest = fn
        return lambda ids, step: self.latest(ids, step)
