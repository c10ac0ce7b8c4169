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


class Bursting(ReferenceBackend):
    """A right burst, made of steps. Twins override `next`: of a step and a token that was drawn, the next step and its
    id; `number`: of all, the i-th; `ends`: whether an id is the last."""

    features = ReferenceBackend.features | {"burst"}

    def next(self, step: Step, drawn: int, first: int) -> tuple[Step, int]:
        return replace(step, starts=step.starts + np.int32(1)), drawn

    def number(self, u: np.ndarray, i: int) -> np.ndarray:
        return u[i : i + 1]

    def ends(self, drawn: int, stop) -> bool:
        return drawn in stop

    def compile(self, fn, state=()):
        def run(ids, step):
            return fn(ids, step)

        def burst(ids, step, params, u, stop=()):
            step.cache.check(replace(step, starts=step.starts + np.int32(len(u) - 1)))
            first = drawn = int(self.numpy(ids)[0, 0])
            found = []
            for i in range(len(u)):
                logits = fn(self.array(np.array([[drawn]], np.int32)), step)
                found.append(int(self.numpy(self.sample(logits, [params], self.number(u, i)).ids)[0]))
                step, drawn = self.next(step, found[-1], first)
                if self.ends(found[-1], stop):
                    break
            return np.array(found, np.int32)

        run.burst = burst
        return run


@twin("compiled")
class BurstThatFills(Bursting):
    """Where there is no more room it ends, without a word."""

    def compile(self, fn, state=()):
        run = super().compile(fn, state)
        right = run.burst
        run.burst = lambda ids, step, params, u, stop=(): right(
            ids, step, params, u[: step.cache.capacity - int(step.starts[0])], stop
        )
        return run


@twin("compiled")
class BurstInOnePlace(Bursting):
    def next(self, step, drawn, first):
        return step, drawn


@twin("compiled")
class BurstOfOneInput(Bursting):
    def next(self, step, drawn, first):
        return super().next(step, first, first)


@twin("compiled")
class BurstOfOneNumber(Bursting):
    def number(self, u, i):
        return u[:1]


@twin("compiled")
class BurstBeyondItsEnd(Bursting):
    def ends(self, drawn, stop):
        return False


@twin("compiled")
class BurstThatEndsTooLate(Bursting):
    """A token behind the last one."""

    ended = False

    def ends(self, drawn, stop):
        before, self.ended = self.ended, drawn in stop
        return before


@twin("compiled")
class OneResultForAllPlans(ReferenceBackend):
    """Every plan replays the latest recording."""

    def compile(self, fn, state=()):
        self.latest = fn
        return lambda ids, step: self.latest(ids, step)
