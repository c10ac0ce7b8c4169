"""Mixers that keep a state: in pieces, in batches, after going back, the same as in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...backends.base import A, Backend, Cache, StateCache, Step
from ...errors import ContextFull
from ...tensors import Tensor
from ..suite import Pair, case, concatenated, equal, int32

C, TAPS = 6, 4
K, H, DK, DV = 2, 4, 8, 6


@dataclass
class Mixer:
    """Random inputs, weights, and how the operation takes them."""

    name: str
    inputs: list[np.ndarray]
    weights: list[Tensor | None] = field(repr=False)

    @property
    def spec(self) -> StateCache:
        return StateCache(conv=(TAPS - 1, C)) if self.name == "convolution" else StateCache(memory=(H, DK, DV))

    def run(self, ops: Backend, inputs: Sequence[np.ndarray], step: Step, layer: int = 0) -> np.ndarray:
        arrays: list[A] = [ops.array(x) for x in inputs]
        weights = [None if w is None else ops.prepare(w) for w in self.weights]
        operation = ops.short_convolution if self.name == "convolution" else ops.gated_delta
        return ops.numpy(operation(*arrays, *weights, step, layer))

    def part(self, rows: slice = slice(None), tokens: slice = slice(None)) -> list[np.ndarray]:
        return [x[rows, tokens] for x in self.inputs]

    def whole(self, ops: Backend) -> np.ndarray:
        return self.run(ops, self.inputs, Step.whole(*self.inputs[0].shape[:2]))

    def pieces(self, ops: Backend, cache: Cache, slot: int, start: int, sizes: Sequence[int]) -> np.ndarray:
        """Row 0's tokens from `start` on, some at a time."""
        out = []
        for n in sizes:
            step = Step(int32(start), int32(n), int32(slot), cache=cache)
            out.append(self.run(ops, self.part(slice(1), slice(start, start + n)), step))
            cache.advance(step.slots, step.lengths)
            start += n
        return concatenated(out)


def mixer(pair: Pair, name: str, rows: int, tokens: int, bias: bool = True) -> Mixer:
    if name == "convolution":
        return Mixer(name, [pair.normal(rows, tokens, C)], [pair.weight(C, TAPS), pair.weight(C) if bias else None])
    shapes = ((K, DK), (K, DK), (H, DV), (H,), (H,))
    return Mixer(name, [pair.normal(rows, tokens, *shape) for shape in shapes], [pair.weight(H), pair.weight(H)])


NAMES = ["convolution", "delta"]


@case("recurrent", bias=[True, False], tokens=[1, 2, 9])
def convolution_by_the_book(pair: Pair, bias: bool, tokens: int) -> None:
    m = mixer(pair, "convolution", 2, tokens, bias)
    (x,), w = m.inputs, m.weights[0].parts["weight"]
    want = np.zeros(x.shape) + (m.weights[1].parts["weight"] if bias else 0.0)
    for t in range(tokens):
        for j in range(TAPS):
            if t - TAPS + 1 + j >= 0:
                want[:, t] += w[:, j].astype(np.float64) * x[:, t - TAPS + 1 + j]
    pair.close("chain", m.whole(pair.backend), want)


@case("recurrent", tokens=[1, 2, 9])
def delta_by_the_book(pair: Pair, tokens: int) -> None:
    """Every head and token by itself, in float64."""
    m = mixer(pair, "delta", 2, tokens)
    q, k, v, a, b = (x.astype(np.float64) for x in m.inputs)
    rate, shift = (w.parts["weight"].astype(np.float64) for w in m.weights)
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    want = np.zeros(v.shape)
    for row, h in np.ndindex(2, H):
        memory, read = np.zeros((DK, DV)), h // (H // K)
        for t in range(tokens):
            memory *= np.exp(-np.exp(rate[h]) * np.log1p(np.exp(a[row, t, h] + shift[h])))
            lacking = v[row, t, h] - memory.T @ k[row, t, read]
            memory += np.outer(k[row, t, read], lacking) / (1 + np.exp(-b[row, t, h]))
            want[row, t, h] = memory.T @ q[row, t, read] / np.sqrt(DK)
    pair.close("chain", m.whole(pair.backend), want)


@case("recurrent", name=NAMES, sizes=[(9,), (1,) * 9, (5, 1, 3), (1, 8), (2, 2, 5)])
def any_road_is_the_whole(pair: Pair, name: str, sizes: tuple[int, ...]) -> None:
    m = mixer(pair, name, 1, 9)
    cache = pair.backend.new_cache([m.spec], 2, 9)
    pair.close("chain", m.pieces(pair.backend, cache, 1, 0, sizes), m.whole(pair.backend))


@case("recurrent", name=NAMES)
def layers_and_slots_keep_apart(pair: Pair, name: str) -> None:
    """Two sequences in the slots of two layers, in another order each time."""
    m = mixer(pair, name, 2, 6)
    whole, cache = m.whole(pair.backend), pair.backend.new_cache([m.spec, m.spec], 3, 6)
    for at in range(0, 6, 2):
        order = [0, 1] if at % 4 else [1, 0]
        inputs = [x[order, at : at + 2] for x in m.inputs]
        step = Step(int32(at, at), int32(2, 2), int32(*(2 - row for row in order)), cache=cache)
        m.run(pair.backend, [x * 0 + 1 for x in inputs], step, 1)  # the other layer hears something else
        pair.close("chain", m.run(pair.backend, inputs, step, 0), whole[order, at : at + 2])
        cache.advance(step.slots, step.lengths)


@case("recurrent", name=NAMES)
def padding_leaves_no_trace(pair: Pair, name: str) -> None:
    """Rows of different lengths, one of them idle; each goes on from its own last real token."""
    m = mixer(pair, name, 3, 8)
    whole, cache = m.whole(pair.backend), pair.backend.new_cache([m.spec], 3, 8)
    at = np.zeros(3, np.int32)
    for lengths in ((4, 1, 3), (0, 2, 1), (2, 4, 0), (1, 0, 4)):
        inputs = [np.stack([np.resize(x[i, at[i] : at[i] + 4], (4, *x.shape[2:])) for i in range(3)]) for x in m.inputs]
        step = Step(at.copy(), int32(*lengths), int32(2, 0, 1), cache=cache)
        y = m.run(pair.backend, inputs, step)
        assert np.isfinite(y).all(), "padding is not finite"
        for i, n in enumerate(lengths):
            pair.close("chain", y[i, :n], whole[i, at[i] : at[i] + n])
        cache.advance(step.slots, step.lengths)
        at += int32(*lengths)


@case("recurrent", name=NAMES, back=[0, 3, 6])
def going_back(pair: Pair, name: str, back: int) -> None:
    """To wherever the cache can; from there it is as if nothing had been."""
    m, astray = mixer(pair, name, 1, 9), mixer(pair, name, 1, 9)
    astray.weights = m.weights
    for x, y in zip(astray.inputs, m.inputs, strict=True):
        x[:, :back] = y[:, :back]
    cache = pair.backend.new_cache([m.spec], 1, 9)
    astray.pieces(pair.backend, cache, 0, 0, [4, 2])
    held = cache.truncate(0, back)
    assert 0 <= held <= back and cache.lengths[0] == held, f"truncate({back}) went to {held}, {cache.lengths} held"
    equal("truncate(0, 9)", [cache.truncate(0, 9), int(cache.lengths[0])], [held, held])
    whole = m.whole(pair.backend)
    pair.close("chain", m.pieces(pair.backend, cache, 0, held, [1, 8 - held]), whole[:, held:])


@case("recurrent", name=NAMES)
def a_slot_used_again(pair: Pair, name: str) -> None:
    m = mixer(pair, name, 1, 5)
    cache = pair.backend.new_cache([m.spec], 2, 5)
    mixer(pair, name, 1, 5).pieces(pair.backend, cache, 1, 0, [5])
    cache.reset(1)
    equal("lengths", cache.lengths, [0, 0])
    pair.close("chain", m.pieces(pair.backend, cache, 1, 0, [1, 4]), m.whole(pair.backend))


@case("recurrent", name=NAMES)
def snapshot_and_restore(pair: Pair, name: str) -> None:
    m = mixer(pair, name, 1, 8)
    whole = m.whole(pair.backend)
    cache, second = (pair.backend.new_cache([m.spec], 2, 8) for _ in range(2))
    assert cache.nbytes > 0, "a cache that takes no memory"
    m.pieces(pair.backend, cache, 1, 0, [5])
    state = cache.snapshot(1)
    mixer(pair, name, 1, 8).pieces(pair.backend, cache, 1, 5, [3])
    for kept, slot in ((cache, 0), (second, 1), (cache, 1)):
        kept.restore(slot, state)
        assert kept.lengths[slot] == 5, "restore does not bring the length back"
        pair.close("chain", m.pieces(pair.backend, kept, slot, 5, [1, 2]), whole[:, 5:])


@case("recurrent", name=NAMES)
def packed_is_separate(pair: Pair, name: str) -> None:
    m = mixer(pair, name, 2, 9)
    segments = np.array([[0] * 4 + [1] * 5, [0, 1] + [2] * 7], np.int32)
    packed = m.run(pair.backend, m.inputs, Step.whole(2, 9, segments))
    for row, document in ((0, slice(4, 9)), (0, slice(0, 4)), (1, slice(1, 2)), (1, slice(2, 9))):
        alone = m.part(slice(row, row + 1), document)
        pair.close(
            "chain", packed[row : row + 1, document], m.run(pair.backend, alone, Step.whole(1, alone[0].shape[1]))
        )


@case("recurrent", name=NAMES)
def full_is_said(pair: Pair, name: str) -> None:
    """Before anything is written."""
    m = mixer(pair, name, 1, 6)
    cache = pair.backend.new_cache([m.spec], 1, 5)
    m.pieces(pair.backend, cache, 0, 0, [4])
    try:
        m.run(pair.backend, m.part(tokens=slice(4, 6)), Step(int32(4), int32(2), int32(0), cache=cache))
    except ContextFull:
        pair.close("chain", m.pieces(pair.backend, cache, 0, 4, [1]), m.whole(pair.backend)[:, 4:5])
        return
    raise AssertionError("six tokens went into a cache of five")
