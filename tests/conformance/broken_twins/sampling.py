"""Tokens chosen in another way than was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends import sampling
from ondevice.backends.base import SamplingParams
from ondevice.backends.numerics import log_softmax, softmax
from ondevice.backends.reference import NumpyKernels, ReferenceBackend
from ondevice.backends.tape import Array

from . import twin


class Choosing(ReferenceBackend):
    """Twins that choose wrongly override `way`: the parameters that they take the given ones for."""

    def sample(self, logits, params, u, counts=None, mask=None):
        return super().sample(logits, [self.way(p) for p in params], u, counts, mask)


@twin("sampling")
class TopKOneTooMany(Choosing):
    def way(self, p: SamplingParams) -> SamplingParams:
        return replace(p, top_k=p.top_k and p.top_k + 1)


@twin("sampling")
class NoMinP(Choosing):
    def way(self, p: SamplingParams) -> SamplingParams:
        return replace(p, min_p=0.0)


@twin("sampling")
class PresenceAsFrequency(Choosing):
    def way(self, p: SamplingParams) -> SamplingParams:
        return replace(p, presence=0.0, frequency=p.frequency + p.presence)


@twin("sampling")
class NoRepetition(Choosing):
    def way(self, p: SamplingParams) -> SamplingParams:
        return replace(p, repetition=1.0)


@twin("sampling")
class OneTemperature(Choosing):
    def way(self, p: SamplingParams) -> SamplingParams:
        return replace(p, temperature=min(p.temperature, 1.0))


@twin("sampling")
class FirstRowsWayForAll(ReferenceBackend):
    def sample(self, logits, params, u, counts=None, mask=None):
        return super().sample(logits, [params[0]] * len(params), u, counts, mask)


@twin("sampling")
class NoMask(ReferenceBackend):
    def sample(self, logits, params, u, counts=None, mask=None):
        return super().sample(logits, params, u, counts)


@twin("sampling")
class TemperatureFirst(ReferenceBackend):
    """Temperature before penalties and bias."""

    def sample(self, logits, params, u, counts=None, mask=None):
        warm = np.stack([row / (p.temperature or 1.0) for row, p in zip(logits.data, params, strict=True)])
        cooled = [replace(p, temperature=min(p.temperature, 1.0) and 1.0) for p in params]
        return super().sample(Array(self, warm.astype(np.float32)), cooled, u, counts, mask)


@twin("sampling")
class RepetitionOnlyOfTheAnswer(ReferenceBackend):
    def sample(self, logits, params, u, counts=None, mask=None):
        return super().sample(logits, params, u, counts and (counts[0] * 0, counts[1]), mask)


@twin("sampling")
class LikeliestFirst(NumpyKernels):
    """The running sum goes from the likeliest down instead of through the vocabulary."""

    def sample(self, logits, params, u, counts, mask):
        order = np.argsort(-logits, -1, kind="stable")
        fields = [np.take_along_axis(a, order, -1) for a in (logits, *(counts or ()))]
        shown = None if mask is None else np.take_along_axis(mask, order, -1)
        ids = sampling.sample(fields[0], params, u, tuple(fields[1:]) if counts else None, shown)[0]
        ids = np.take_along_axis(order, ids[:, None], -1)[:, 0].astype(np.int32)
        return ids, *sampling.sample(logits, params, u, counts, mask)[1:]


@twin("sampling")
class LastAmongEquals(NumpyKernels):
    def sample(self, logits, params, u, counts, mask):
        ids, *rest = sampling.sample(logits, params, u, counts, mask)
        for row, p in enumerate(params):
            if p.temperature == 0 and counts is None:
                ids[row] = np.flatnonzero(logits[row] == logits[row].max())[-1]
        return ids, *rest


@twin("sampling")
class TopPStopsShort(NumpyKernels):
    """The token that crosses top-p is left out (unless it is the first)."""

    def sample(self, logits, params, u, counts, mask):
        if counts is None or mask is not None or any(p.top_p == 1.0 for p in params):
            return sampling.sample(logits, params, u, counts, mask)
        ids = []
        for row, p in enumerate(params):
            scores = sampling.penalised(logits[row], p, (counts[0][row], counts[1][row])) / p.temperature
            order = np.argsort(-scores, kind="stable")
            running = np.cumsum(softmax(scores)[order])
            kept = order[: max(1, int((running < p.top_p).sum()))]
            shares = np.zeros_like(scores)
            shares[kept] = softmax(scores[kept])
            ids.append(np.searchsorted(np.cumsum(shares), u[row], side="right"))
        return np.array(ids, np.int32), None, None


@twin("sampling")
class LogprobsWithPenalties(NumpyKernels):
    def sample(self, logits, params, u, counts, mask):
        ids, chosen, top = sampling.sample(logits, params, u, counts, mask)
        if chosen is not None and counts is not None:
            rows = [sampling.penalised(r, p, (a, b)) for r, p, a, b in zip(logits, params, *counts, strict=True)]
            chosen = np.take_along_axis(log_softmax(np.stack(rows)), ids[:, None], -1)[:, 0]
        return ids, chosen, top


@twin("sampling")
class DrawsNothing(NumpyKernels):
    """u is not looked at."""

    def sample(self, logits, params, u, counts, mask):
        return sampling.sample(logits, params, u * 0 + 0.5, counts, mask)


@twin("sampling")
class TopKOfMoreThanThereAre(NumpyKernels):
    def sample(self, logits, params, u, counts, mask):
        for p in params:
            np.partition(logits, -max(p.top_k, 1), axis=-1)
        return sampling.sample(logits, params, u, counts, mask)


@twin("sampling")
class AlwaysLogprobs(NumpyKernels):
    def sample(self, logits, params, u, counts, mask):
        ids, chosen, top = sampling.sample(logits, params, u, counts, mask)
        return ids, log_softmax(logits).max(-1) if chosen is None else chosen, top


@twin("sampling")
class SecondBest(NumpyKernels):
    """Greedy is not."""

    def sample(self, logits, params, u, counts, mask):
        ids, chosen, top = sampling.sample(logits, params, u, counts, mask)
        cold = np.array([p.temperature == 0 for p in params])
        return np.where(cold, np.argsort(logits, -1)[:, -2:][:, 0], ids).astype(np.int32), chosen, top


@twin("sampling")
class TopPNeedsOnePercent(Choosing):
    def way(self, p: SamplingParams) -> SamplingParams:
        return replace(p, top_p=p.top_p if p.top_p > 0.01 else 1.0)
