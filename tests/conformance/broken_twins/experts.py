"""Routers, experts and latent attention gone wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends.numerics import softmax, visible
from ondevice.backends.reference import NumpyKernels, ReferenceBackend

from . import twin
from .seeing import Seeing

# ------------------------------------------------------------------------------------------------ experts


@twin("experts")
class GatesAsTheyAre(NumpyKernels):
    def gates(self, logits, ids, rule):
        return super().gates(logits, ids, replace(rule, renormalise=False))


@twin("experts")
class AlwaysRenormalised(NumpyKernels):
    def gates(self, logits, ids, rule):
        return super().gates(logits, ids, replace(rule, renormalise=True))


@twin("experts")
class GatesWithoutScale(NumpyKernels):
    def gates(self, logits, ids, rule):
        return super().gates(logits, ids, replace(rule, scale=1.0))


@twin("experts")
class ExpertsPermuted(NumpyKernels):
    def expert_linear(self, x, weight, bias, gates, ids):
        return super().expert_linear(x, np.roll(self.values(weight), 1, 0), bias, gates, ids)


@twin("experts")
class ExpertsInOrderOfId(NumpyKernels):
    def elect(self, logits, k, rule, bias=None):
        return np.sort(super().elect(logits, k, rule, bias), -1)


@twin("experts")
class HigherIdAmongEquals(NumpyKernels):
    def elect(self, logits, k, rule, bias=None):
        e = logits.shape[1]
        reverse = None if bias is None else self.values(bias)[::-1]
        return (e - 1 - super().elect(logits[:, ::-1], k, rule, reverse)).astype(np.int32)


@twin("experts")
class CorrectionCountsInGates(NumpyKernels):
    def elect(self, logits, k, rule, bias=None):
        self.correction = 0.0 if bias is None else self.values(bias)
        return super().elect(logits, k, rule, bias)

    def gates(self, logits, ids, rule):
        return super().gates(logits + self.correction, ids, rule)


@twin("experts")
class CorrectionForgotten(NumpyKernels):
    def elect(self, logits, k, rule, bias=None):
        return super().elect(logits, k, rule)


@twin("experts")
class GroupsForgotten(NumpyKernels):
    def elect(self, logits, k, rule, bias=None):
        return super().elect(logits, k, replace(rule, groups=1), bias)


@twin("experts")
class GroupsByTheirBest(NumpyKernels):
    """A group counts as much as its best expert instead of its two best."""

    def elect(self, logits, k, rule, bias=None):
        if rule.groups == 1:
            return super().elect(logits, k, rule, bias)
        scores = self.scores(logits, rule) + (0.0 if bias is None else self.values(bias))
        grouped = scores.reshape(len(scores), rule.groups, -1)
        losers = np.argsort(-grouped.max(-1), -1, kind="stable")[:, rule.top_groups :]
        np.put_along_axis(grouped, losers[:, :, None], -np.inf, 1)
        return np.argsort(-grouped.reshape(scores.shape), -1, kind="stable")[:, :k].astype(np.int32)


@twin("experts")
class SoftmaxForSigmoid(NumpyKernels):
    def scores(self, logits, rule):
        return softmax(logits)


@twin("experts")
class RivalsOfAll(NumpyKernels):
    """The sparsemixer without the nearness: every expert left shares."""

    def gates(self, logits, ids, rule):
        return super().gates(logits, ids, replace(rule, jitter=100.0))


@twin("experts")
class RivalsElectedBefore(NumpyKernels):
    """Every gate is a share among all experts near it, also of those elected before."""

    def gates(self, logits, ids, rule):
        each = [super(RivalsElectedBefore, self).gates(logits, column[:, None], rule) for column in ids.T]
        return np.concatenate(each, 1) if rule.scoring == "sparsemixer" else super().gates(logits, ids, rule)


@twin("experts")
class GatesOnInputAndOutput(ReferenceBackend):
    def combine(self, y, routing):
        return self._call("combine", (y, routing.gates))


@twin("experts")
class FirstInputForAll(NumpyKernels):
    def expert_linear(self, x, weight, bias, gates, ids):
        return super().expert_linear(x[:, 0] if x.ndim == 3 else x, weight, bias, gates, ids)


@twin("experts")
class BiasOfTheFirstExpert(NumpyKernels):
    def expert_linear(self, x, weight, bias, gates, ids):
        b = None if bias is None else np.broadcast_to(self.values(bias)[0], self.values(bias).shape)
        return super().expert_linear(x, weight, b, gates, ids)


# ------------------------------------------------------------------------------------------------ latent attention


@twin("latent")
class NoRotaryPart(NumpyKernels):
    def absorbed(self, q_nope, q_rope, c, k_rope, wk):
        return super().absorbed(q_nope, np.zeros_like(q_rope), c, k_rope, wk)


@twin("latent")
class LatentOfTheWholeRow(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, spec)


@twin("latent")
class ValuesByTheKeysMap(NumpyKernels):
    def latent_attention(self, q_nope, q_rope, c, k_rope, wk, wv, spec, step, layer):
        wrong = self.values(wk)[:, : self.values(wv).shape[1]]
        return super().latent_attention(q_nope, q_rope, c, k_rope, wk, wrong, spec, step, layer)


@twin("latent")
class RotaryPartIsNotCached(NumpyKernels):
    """Right in one pass; what is read back has lost its positions."""

    def context(self, k, v, spec, step, layer, row):
        keys, values, seen = super().context(k, v, spec, step, layer, row)
        if step.cache is not None:
            keys = keys.copy()
            keys[:, : int(step.starts[row]), -4:] = 0.0
        return keys, values, seen
