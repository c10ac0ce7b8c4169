"""States that are lost, kept too long, or mixed up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends import recurrence
from ondevice.backends.reference import HostCache, NumpyKernels

from . import twin


@twin("recurrence")
class TapsReversed(NumpyKernels):
    def short_convolution(self, x, weight, bias, step, layer):
        return super().short_convolution(x, self.values(weight)[:, ::-1], bias, step, layer)


@twin("recurrence")
class ConvolutionForgets(NumpyKernels):
    """Each piece begins with zeros."""

    def short_convolution(self, x, weight, bias, step, layer):
        return super().short_convolution(x, weight, bias, replace(step, starts=step.starts * 0), layer)


@twin("recurrence")
class PaddingIsHeard(NumpyKernels):
    def short_convolution(self, x, weight, bias, step, layer):
        all_of_it = np.full_like(step.lengths, x.shape[1]) * (step.lengths > 0)
        return super().short_convolution(x, weight, bias, replace(step, lengths=all_of_it.astype(np.int32)), layer)


@twin("recurrence")
class ConvolutionCrossesDocuments(NumpyKernels):
    def short_convolution(self, x, weight, bias, step, layer):
        return super().short_convolution(x, weight, bias, replace(step, segments=None), layer)


@twin("recurrence")
class BiasTwice(NumpyKernels):
    def short_convolution(self, x, weight, bias, step, layer):
        y = super().short_convolution(x, weight, bias, step, layer)
        return y if bias is None else y + self.values(bias)


@twin("recurrence")
class MemoryNeverFades(NumpyKernels):
    def _delta_inputs(self, *inputs):
        q, k, keep, learn = super()._delta_inputs(*inputs)
        return q, k, np.ones_like(keep), learn


@twin("recurrence")
class LearnsWithoutRestraint(NumpyKernels):
    def _delta_inputs(self, *inputs):
        q, k, keep, learn = super()._delta_inputs(*inputs)
        return q, k, keep, np.ones_like(learn)


@twin("recurrence")
class QueriesNotScaled(NumpyKernels):
    def _delta_inputs(self, *inputs):
        q, *rest = super()._delta_inputs(*inputs)
        return q * q.shape[-1] ** 0.5, *rest


@twin("recurrence")
class KeysNotUnit(NumpyKernels):
    def _delta_inputs(self, q, k, *inputs):
        q, unit, *rest = super()._delta_inputs(q, k, *inputs)
        return q, np.repeat(k, unit.shape[2] // k.shape[2], axis=2), *rest


@twin("recurrence")
class HeadsDealtRound(NumpyKernels):
    """Head h reads key head h % K."""

    def _delta_inputs(self, q, k, v, *inputs):
        _, _, *rest = super()._delta_inputs(q, k, v, *inputs)
        group = v.shape[2] // q.shape[2]
        q, k = (np.tile(recurrence._unit(x), (1, 1, group, 1)) for x in (q, k))
        return q * q.shape[-1] ** -0.5, k, *rest


@twin("recurrence")
class MemoryOfRowsForSlots(NumpyKernels):
    def gated_delta(self, *inputs):
        *inputs, step, layer = inputs
        return super().gated_delta(*inputs, replace(step, slots=np.arange(len(step.slots), dtype=np.int32)), layer)


@twin("recurrence")
class OneMemoryForAllLayers(NumpyKernels):
    def gated_delta(self, *inputs):
        return super().gated_delta(*inputs[:-1], 0)


@twin("recurrence")
class MemoryCrossesDocuments(NumpyKernels):
    def gated_delta(self, *inputs):
        *inputs, step, layer = inputs
        return super().gated_delta(*inputs, replace(step, segments=None), layer)


@twin("recurrence")
class SaysItWentBack(HostCache):
    def truncate(self, slot, length):
        self.lengths[slot] = min(int(self.lengths[slot]), length)
        return int(self.lengths[slot])


@twin("recurrence")
class StatesOutliveTheirText(NumpyKernels):
    """What a slot holds counts even for a row that starts at 0."""

    def gated_delta(self, *inputs):
        *inputs, step, layer = inputs
        if step.cache is not None:
            step = replace(step, starts=np.maximum(step.starts, 1), cache=_Roomier(step.cache))
        return super().gated_delta(*inputs, step, layer)


class _Roomier:
    def __init__(self, cache):
        self.states = cache.states

    def check(self, step):
        pass


@twin("recurrence")
class SnapshotsWithoutStates(HostCache):
    def restore(self, slot, state):
        n, parts, _ = state
        super().restore(slot, (n, parts, [layer.slot(slot).copy() for layer in self.states]))


@twin("recurrence")
class StatesNeverFull(HostCache):
    def check(self, step):
        pass


@twin("training")
class DecayNotTrained(NumpyKernels):
    def gated_delta_vjp(self, *inputs):
        grads = list(super().gated_delta_vjp(*inputs))
        grads[5] = grads[5] * 0
        return tuple(grads)


@twin("training")
class TapsGradientReversed(NumpyKernels):
    def short_convolution_vjp(self, *inputs):
        to_x, to_w, to_b = super().short_convolution_vjp(*inputs)
        return to_x, to_w[:, ::-1], to_b
