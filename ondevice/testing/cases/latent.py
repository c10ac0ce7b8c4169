"""Multi-head latent attention: expanded or absorbed, prefilled or step by step, the same."""

from __future__ import annotations

import numpy as np

from ...backends.base import AttentionSpec, Backend, Cache, LayerCache, Step
from ..suite import Pair, case, concatenated, int32
from .attention import ROUNDED

H, N, R, L, V = 3, 8, 4, 12, 6  # heads, plain and rotary query sizes, latent, value size


class Latents:
    """Random q_nope [B, T, H, N], q_rope [B, T, H, R], c [B, T, L], k_rope [B, T, R]; wk [H, N, L], wv [H, V, L]."""

    def __init__(self, pair: Pair, rows: int, tokens: int, spec: AttentionSpec):
        shapes = ((rows, tokens, H, N), (rows, tokens, H, R), (rows, tokens, L), (rows, tokens, R))
        self.arrays = [pair.normal(*shape) for shape in shapes]
        self.weights = [pair.weight(H, N, L), pair.weight(H, V, L)]
        self.spec = spec

    def attend(self, ops: Backend, step: Step, tokens: slice = slice(None), rows: slice = slice(None)) -> np.ndarray:
        arrays = [ops.array(a[rows, tokens]) for a in self.arrays]
        weights = [ops.prepare(w) for w in self.weights]
        return ops.numpy(ops.latent_attention(*arrays, *weights, self.spec, step, 0))


SPECS = {"plain": AttentionSpec(0.3), "window": AttentionSpec(0.3, window=3)}


@case("latent", spec=SPECS, tokens=[1, 7])
def alone(pair: Pair, spec: str, tokens: int) -> None:
    x, step = Latents(pair, 2, tokens, SPECS[spec]), Step.whole(2, tokens)
    got = x.attend(pair.backend, step)
    pair.close("chain", got, x.attend(pair.reference, step))
    pair.close("chain", got, expanded(pair, x))


def expanded(pair: Pair, x: Latents) -> np.ndarray:
    """By ordinary attention, every head's keys and values written out."""
    q_nope, q_rope, c, k_rope = x.arrays
    wk, wv = (w.parts["weight"] for w in x.weights)
    shared = np.broadcast_to(k_rope[:, :, None], (*k_rope.shape[:2], H, R))
    q, k = np.concatenate([q_nope, q_rope], -1), np.concatenate([np.einsum("btl,hnl->bthn", c, wk), shared], -1)
    v = np.einsum("btl,hvl->bthv", c, wv)
    ops = pair.reference
    y = ops.attention(*(ops.array(a) for a in (q, k, v)), None, x.spec, Step.whole(*c.shape[:2]), 0)
    return ops.numpy(y)


def pieces(ops: Backend, cache: Cache, x: Latents, slot: int, start: int, sizes: tuple[int, ...]) -> np.ndarray:
    out = []
    for n in sizes:
        step = Step(int32(start), int32(n), int32(slot), cache=cache)
        out.append(x.attend(ops, step, slice(start, start + n)))
        cache.advance(step.slots, step.lengths)
        start += n
    return concatenated(out)


@case("latent", spec=SPECS, sizes=[(9,), (1,) * 9, (5, 1, 3)])
def any_road_is_the_whole(pair: Pair, spec: str, sizes: tuple[int, ...]) -> None:
    x = Latents(pair, 1, 9, SPECS[spec])
    cache = pair.backend.new_cache([LayerCache(1, L + R, 0, SPECS[spec].window)], 2, 9)
    whole = x.attend(pair.backend, Step.whole(1, 9))
    pair.close("chain", pieces(pair.backend, cache, x, 1, 0, sizes), whole)
    held = cache.truncate(1, 4)
    pair.close("chain", pieces(pair.backend, cache, x, 1, held, (9 - held,)), whole[:, held:])


@case("latent", sizes=[(9,), (5, 1, 3)])
def in_eight_bits(pair: Pair, sizes: tuple[int, ...]) -> None:
    """A token's latent and its rotary key share a scale."""
    if "int8_cache" not in pair.backend.features:
        return
    x, results = Latents(pair, 1, 9, SPECS["plain"]), []
    for ops in (pair.backend, pair.reference):
        cache = ops.new_cache([LayerCache(1, L + R, 0)], 2, 9, "int8")
        results.append(pieces(ops, cache, x, 1, 0, sizes))
    pair.close("chain", *results, tolerance=ROUNDED + pair.tolerance("chain"))


@case("latent")
def packed_is_separate(pair: Pair) -> None:
    x = Latents(pair, 1, 9, SPECS["plain"])
    segments = np.array([[0] * 4 + [1] * 5], np.int32)
    packed = x.attend(pair.backend, Step.whole(1, 9, segments))
    pair.close("chain", packed[:, 4:], x.attend(pair.backend, Step.whole(1, 5), slice(4, 9)))
