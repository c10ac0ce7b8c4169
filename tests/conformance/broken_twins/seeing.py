"""Attention that sees, scores or groups wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends.numerics import visible
from ondevice.backends.reference import NumpyKernels

from . import twin

# ------------------------------------------------------------------------------------------------ who sees whom


class Seeing(NumpyKernels):
    """Twins that see wrongly override `seen`: where the queries and the keys are, -> bool [T, S]"""

    def context(self, k, v, spec, step, layer, row):
        keys, values, _ = super().context(k, v, spec, step, layer, row)
        start, n = int(step.starts[row]), int(step.lengths[row])
        first = 0 if step.cache is not None else start
        segments = None if step.segments is None else (step.segments[row, :n],) * 2
        return keys, values, self.seen(np.arange(start, start + n), np.arange(first, start + n), spec, segments)


@twin("attention")
class SeesTheNextToken(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i + 1, j, replace(spec, window=spec.window and spec.window + 1), segments)


@twin("attention")
class DoesNotSeeItself(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, spec, segments) & (j[None] < np.maximum(i, 1)[:, None])


@twin("attention")
class WindowOneTooWide(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, replace(spec, window=spec.window and spec.window + 1), segments)


@twin("attention")
class WindowOneTooNarrow(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, replace(spec, window=spec.window and max(spec.window - 1, 1)), segments)


@twin("attention")
class NoWindow(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, replace(spec, window=None), segments)


@twin("attention")
class ChunksAsWindows(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, replace(spec, window=spec.chunk or spec.window, chunk=None), segments)


@twin("attention")
class SeesOtherDocuments(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i, j, spec)


@twin("attention")
class SegmentsOfTheFirstRow(NumpyKernels):
    def context(self, k, v, spec, step, layer, row):
        if step.segments is not None:
            step = replace(step, segments=np.repeat(step.segments[:1], len(step.segments), 0))
        return super().context(k, v, spec, step, layer, row)


@twin("attention")
class MaskForgetsWhatTheCacheHolds(Seeing):
    def seen(self, i, j, spec, segments):
        return visible(i - i[:1], j, spec, segments) if i.size else visible(i, j, spec, segments)


# ------------------------------------------------------------------------------------------------ scores


@twin("attention")
class NoScale(NumpyKernels):
    def weights(self, q, keys, sink, seen, spec):
        return super().weights(q, keys, sink, seen, replace(spec, scale=1.0))


@twin("attention")
class NoSoftcap(NumpyKernels):
    def weights(self, q, keys, sink, seen, spec):
        return super().weights(q, keys, sink, seen, replace(spec, softcap=None))


@twin("attention")
class NoSinks(NumpyKernels):
    def weights(self, q, keys, sink, seen, spec):
        return super().weights(q, keys, None, seen, spec)


@twin("attention")
class SinksScaled(NumpyKernels):
    def weights(self, q, keys, sink, seen, spec):
        return super().weights(q, keys, None if sink is None else sink * spec.scale, seen, spec)


@twin("attention")
class HeadsInTurn(NumpyKernels):
    """Query head h reads key head h % K."""

    def attend(self, q, keys, values, sinks, seen, spec):
        turn = [h % len(keys) for h in range(q.shape[1])]
        return super().attend(q, keys[turn], values[turn], sinks, seen, spec)


@twin("attention")
class ScoresOverflow(NumpyKernels):
    """softmax without taking the largest away first."""

    def weights(self, q, keys, sink, seen, spec):
        scores = (
            q @ keys.T * spec.scale if spec.softcap is None else self.softcap(q @ keys.T * spec.scale, spec.softcap)
        )
        with np.errstate(all="ignore"):
            raw = np.exp(scores) * seen
            return raw / (raw.sum(-1, keepdims=True) + (0.0 if sink is None else np.exp(sink)))
