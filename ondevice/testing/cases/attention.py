"""Attention with and without a cache: who sees whom, what is kept, and that no road to a state shows in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...backends.base import AttentionSpec, Backend, Cache, LayerCache, Step
from ...errors import OnDeviceError
from ...tensors import Tensor
from ..suite import Pair, case, concatenated, equal, int32


@dataclass(frozen=True)
class Layer:
    """One layer's attention, and a name for it in a case's name."""

    name: str
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    spec: AttentionSpec = field(default=AttentionSpec(0.35))
    sinks: bool = False

    @property
    def cache(self) -> LayerCache:
        return LayerCache(self.kv_heads, self.dim, self.value_dim, self.spec.window)


PLAIN = Layer("plain")
LAYERS = [
    PLAIN,
    Layer("every_head_its_own", kv_heads=4),
    Layer("one_kv_head", heads=6, kv_heads=1, dim=16, value_dim=16),
    Layer("narrow_values", heads=3, kv_heads=3, dim=12, value_dim=5),
    Layer("head_64", heads=9, kv_heads=3, dim=64, value_dim=64, spec=AttentionSpec(0.125)),
    Layer("head_80", heads=2, kv_heads=2, dim=80, value_dim=80, spec=AttentionSpec(0.11)),
    Layer("head_256", heads=2, kv_heads=1, dim=256, value_dim=256, spec=AttentionSpec(0.0625)),
    Layer("window", spec=AttentionSpec(0.35, window=3)),
    Layer("window_of_one", spec=AttentionSpec(0.35, window=1)),
    Layer("chunk", spec=AttentionSpec(0.35, chunk=4)),
    Layer("softcap", spec=AttentionSpec(1.5, softcap=2.0)),
    Layer("sinks", sinks=True),
    Layer("all_at_once", spec=AttentionSpec(0.7, window=4, softcap=3.0), sinks=True),
]
BY_NAME = {layer.name: layer for layer in LAYERS}
FEW = [BY_NAME[name] for name in ("plain", "one_kv_head", "window", "chunk", "all_at_once")]
LONG = [
    Layer("long", heads=2, kv_heads=1, dim=32, value_dim=32, spec=AttentionSpec(0.2)),
    Layer("long_window", heads=2, kv_heads=1, dim=32, value_dim=32, spec=AttentionSpec(0.2, window=70), sinks=True),
    Layer("long_chunk", heads=2, kv_heads=2, dim=32, value_dim=32, spec=AttentionSpec(0.2, chunk=48, softcap=4.0)),
]


class Tokens:
    """Random q [B, T, H, d], k [B, T, K, d], v [B, T, K, dv] and the layer's sinks."""

    def __init__(self, pair: Pair, layer: Layer, rows: int, tokens: int, sinks: Tensor | None = None):
        self.layer = layer
        self.q = pair.normal(rows, tokens, layer.heads, layer.dim)
        self.k = pair.normal(rows, tokens, layer.kv_heads, layer.dim)
        self.v = pair.normal(rows, tokens, layer.kv_heads, layer.value_dim)
        self.sinks = sinks or (pair.weight(layer.heads) if layer.sinks else None)

    def part(self, rows: slice | Sequence[int], tokens: slice) -> Tokens:
        piece = object.__new__(Tokens)
        piece.layer, piece.sinks = self.layer, self.sinks
        piece.q, piece.k, piece.v = (x[rows, tokens] for x in (self.q, self.k, self.v))
        return piece

    def padded(self, tokens: int) -> Tokens:
        """With rubbish on the right, up to `tokens`."""
        piece = self.part(slice(None), slice(None))
        room = ((0, 0), (0, tokens - self.q.shape[1]), (0, 0), (0, 0))
        piece.q, piece.k, piece.v = (np.pad(x, room, constant_values=9.0) for x in (self.q, self.k, self.v))
        return piece


def attend(ops: Backend, t: Tokens, step: Step, layer: int = 0) -> np.ndarray:
    q, k, v = (ops.array(x) for x in (t.q, t.k, t.v))
    sinks = None if t.sinks is None else ops.prepare(t.sinks)
    return ops.numpy(ops.attention(q, k, v, sinks, t.layer.spec, step, layer))


def feed(
    ops: Backend, cache: Cache, t: Tokens, slots: Sequence[int], lengths: Sequence[int] | None = None
) -> np.ndarray:
    """One forward pass of one layer, as an engine does it: the slots' next tokens, then the cache moves on."""
    rows, tokens = t.q.shape[:2]
    slots, lengths = int32(*slots), int32(*(lengths or [tokens] * rows))
    y = attend(ops, t, Step(cache.lengths[slots].copy(), lengths, slots, cache=cache))
    cache.advance(slots, lengths)
    return y


def pieces(ops: Backend, cache: Cache, t: Tokens, slot: int, sizes: Sequence[int]) -> np.ndarray:
    """One sequence fed to a slot in pieces of these sizes: what comes out of all of them."""
    ends = np.cumsum(sizes).tolist()
    parts = [t.part(slice(0, 1), slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return concatenated([feed(ops, cache, part, [slot]) for part in parts])


def one_layer(ops: Backend, layer: Layer, slots: int = 1, capacity: int = 32) -> Cache:
    return ops.new_cache([layer.cache], slots, capacity)


# ------------------------------------------------------------------------------------------------ without a cache


@case(layer=LAYERS, tokens=[1, 7, 19])
def alone(pair: Pair, layer: Layer, tokens: int) -> None:
    t = Tokens(pair, layer, 2, tokens)
    got, want = (attend(ops, t, Step.whole(2, tokens)) for ops in (pair.backend, pair.reference))
    pair.close("attention", got, want)


@case(layer=FEW)
def ragged_alone(pair: Pair, layer: Layer) -> None:
    """Rows of different lengths: padding is not attended to and stays finite."""
    t = Tokens(pair, layer, 3, 7)
    step = Step(int32(0, 0, 0), int32(7, 1, 4), int32(0, 1, 2))
    got, want = (attend(ops, t, step) for ops in (pair.backend, pair.reference))
    assert np.isfinite(got).all(), "padding is not finite"
    for row, n in enumerate((7, 1, 4)):
        pair.close("attention", got[row, :n], want[row, :n])


@case(layer=FEW)
def packed_is_separate(pair: Pair, layer: Layer) -> None:
    """Documents packed in a row don't see each other."""
    t = Tokens(pair, layer, 2, 12)
    segments = np.array([[0] * 4 + [1] * 8, [5] * 8 + [3] * 3 + [7]], np.int32)
    packed = attend(pair.backend, t, Step.whole(2, 12, segments))
    pair.close("attention", packed, attend(pair.reference, t, Step.whole(2, 12, segments)))
    if layer.spec.chunk is None:  # chunks count from the row's start
        part = t.part(slice(0, 1), slice(4, 12))
        pair.close("attention", packed[:1, 4:], attend(pair.backend, part, Step.whole(1, 8)))


@case()
def the_past_alone(pair: Pair) -> None:
    """Later tokens change nothing; the token itself counts."""
    t = Tokens(pair, PLAIN, 1, 7)
    before = attend(pair.backend, t, Step.whole(1, 7))
    t.k[:, 5:] += 1.0
    t.v[:, 5:] += 1.0
    after = attend(pair.backend, t, Step.whole(1, 7))
    pair.close("attention", after[:, :5], before[:, :5])
    assert np.abs(after[:, 5] - before[:, 5]).max() > 0.05, "a token does not see itself"


@case()
def large_scores(pair: Pair) -> None:
    t = Tokens(pair, PLAIN, 1, 7)
    t.q, t.k = t.q * np.float32(32), t.k * np.float32(32)
    got, want = (attend(ops, t, Step.whole(1, 7)) for ops in (pair.backend, pair.reference))
    pair.close("chain", got, want)


# ------------------------------------------------------------------------------------------------ with one


@case("cache", layer=LAYERS)
def prefill_then_decode(pair: Pair, layer: Layer) -> None:
    t = Tokens(pair, layer, 1, 13)
    got, want = (pieces(ops, one_layer(ops, layer), t, 0, [7, 1, 1, 3, 1]) for ops in (pair.backend, pair.reference))
    pair.close("attention", got, want)


@case("cache", layer=LAYERS, sizes=[(13,), (1,) * 13, (2, 11), (5, 7, 1)])
def any_road_is_the_whole(pair: Pair, layer: Layer, sizes: tuple[int, ...]) -> None:
    """Prefill of T tokens == T steps of decode == attention without a cache."""
    t = Tokens(pair, layer, 1, 13)
    whole = attend(pair.backend, t, Step.whole(1, 13))
    pair.close("attention", pieces(pair.backend, one_layer(pair.backend, layer), t, 0, sizes), whole)


@case("cache", layer=LONG)
def long_texts(pair: Pair, layer: Layer) -> None:
    """Longer than any tile of a kernel: at once, and in pieces that end on neither side of a power of two."""
    t = Tokens(pair, layer, 1, 301)
    got, want = (attend(ops, t, Step.whole(1, 301)) for ops in (pair.backend, pair.reference))
    pair.close("attention", got, want)
    cache = one_layer(pair.backend, layer, capacity=301)
    pair.close("attention", pieces(pair.backend, cache, t, 0, [127, 1, 1, 66, 1, 104, 1]), want)


@case("cache", layer=FEW)
def capacity_exactly_full(pair: Pair, layer: Layer) -> None:
    t = Tokens(pair, layer, 1, 13)
    whole = attend(pair.backend, t, Step.whole(1, 13))
    cache = one_layer(pair.backend, layer, capacity=13)
    pair.close("attention", pieces(pair.backend, cache, t, 0, [12, 1]), whole)


@case("cache", layer=FEW)
def padding_beyond_the_capacity(pair: Pair, layer: Layer) -> None:
    """The real tokens fit exactly, the padding would not: it must not be written anywhere."""
    t = Tokens(pair, layer, 1, 9)
    whole = attend(pair.backend, t, Step.whole(1, 9))
    cache = one_layer(pair.backend, layer, slots=2, capacity=9)
    pieces(pair.backend, cache, t, 1, [7])
    pieces(pair.backend, cache, t, 0, [4])
    both = t.part([0, 0], slice(0, 9))
    both.q[1, :2], both.k[1, :2], both.v[1, :2] = t.q[0, 7:], t.k[0, 7:], t.v[0, 7:]
    both.q[0, :5], both.k[0, :5], both.v[0, :5] = t.q[0, 4:], t.k[0, 4:], t.v[0, 4:]
    y = feed(pair.backend, cache, both.part(slice(0, 2), slice(0, 5)).padded(8), [0, 1], [5, 2])
    pair.close("attention", y[0, :5], whole[0, 4:])
    pair.close("attention", y[1, :2], whole[0, 7:])


@case("cache", layer=FEW)
def ragged_batches(pair: Pair, layer: Layer) -> None:
    """Rows of different lengths, from different positions, in slots out of order: each row as if it were alone."""
    t = Tokens(pair, layer, 3, 15)
    whole = attend(pair.backend, t, Step.whole(3, 15))
    cache = one_layer(pair.backend, layer, slots=4, capacity=15)
    at = np.zeros(3, np.int32)
    for lengths in ((3, 7, 1), (2, 1, 5), (1, 1, 1), (0, 4, 2), (1, 0, 1)):
        rows = [np.arange(a, a + max(lengths)) % 15 for a in at]  # what is past a row's length is padding
        part = t.part(slice(None), slice(0, max(lengths)))
        part.q, part.k, part.v = (np.stack([x[i, r] for i, r in enumerate(rows)]) for x in (t.q, t.k, t.v))
        y = feed(pair.backend, cache, part, [3, 0, 2], lengths)
        assert np.isfinite(y).all(), "padding is not finite"
        for i, n in enumerate(lengths):
            pair.close("attention", y[i, :n], whole[i, at[i] : at[i] + n])
        at += np.array(lengths, np.int32)


@case("cache", layer=[PLAIN, BY_NAME["window"]])
def an_idle_row_is_left_alone(pair: Pair, layer: Layer) -> None:
    """A row of length 0 writes nothing, not even at the place where its padding would go."""
    t = Tokens(pair, layer, 1, 9)
    whole = attend(pair.backend, t, Step.whole(1, 9))
    cache = one_layer(pair.backend, layer, slots=2, capacity=16)
    pieces(pair.backend, cache, t, 0, [6])
    other = Tokens(pair, layer, 2, 2, t.sinks)
    step = Step(int32(0, 0), int32(0, 2), int32(0, 1), cache=cache)
    attend(pair.backend, other, step)
    cache.advance(step.slots, step.lengths)
    pair.close("attention", pieces(pair.backend, cache, t.part(slice(None), slice(6, 9)), 0, [1, 2]), whole[:, 6:])


@case("cache", layer=FEW, road=["reset", "truncate"])
def a_slot_used_again(pair: Pair, layer: Layer, road: str) -> None:
    """What somebody else left in a slot is never seen."""
    cache = one_layer(pair.backend, layer, slots=2, capacity=16)
    old = Tokens(pair, layer, 2, 16)
    feed(pair.backend, cache, old, [0, 1])
    cache.reset(1) if road == "reset" else cache.truncate(1, 0)
    equal("lengths", cache.lengths, [16, 0])
    t = Tokens(pair, layer, 1, 9)
    whole = attend(pair.backend, t, Step.whole(1, 9))
    pair.close("attention", pieces(pair.backend, cache, t, 1, [6, 1, 2]), whole)


@case("cache", layer=LAYERS, back=[11, 8, 2, 0])
def truncated_and_done_again(pair: Pair, layer: Layer, back: int) -> None:
    """Going back and on differently is the same as never having gone there."""
    t = Tokens(pair, layer, 1, 13)
    astray = Tokens(pair, layer, 1, 13, t.sinks)
    for name in ("q", "k", "v"):
        getattr(astray, name)[:, :back] = getattr(t, name)[:, :back]
    cache = one_layer(pair.backend, layer, capacity=16)
    pieces(pair.backend, cache, astray, 0, [6, 1, 5])
    held = cache.truncate(0, back)
    assert 0 <= held <= back and cache.lengths[0] == held, f"truncate({back}) went to {held}, {cache.lengths} held"
    whole = attend(pair.backend, t, Step.whole(1, 13))
    rest = t.part(slice(None), slice(held, 13))
    pair.close("attention", pieces(pair.backend, cache, rest, 0, [1, 12 - held]), whole[:, held:])


@case("cache")
def truncating_forward_does_nothing(pair: Pair) -> None:
    cache = one_layer(pair.backend, PLAIN)
    pieces(pair.backend, cache, Tokens(pair, PLAIN, 1, 5), 0, [5])
    equal("truncate(0, 9) of 5 tokens", [cache.truncate(0, 9), int(cache.lengths[0])], [5, 5])


@case("cache", layer=FEW)
def snapshot_and_restore(pair: Pair, layer: Layer) -> None:
    """A state taken from one slot lives on in another, of another cache too; the first goes its own way."""
    t = Tokens(pair, layer, 1, 13)
    whole = attend(pair.backend, t, Step.whole(1, 13))
    cache, second = (one_layer(pair.backend, layer, slots=2, capacity=16) for _ in range(2))
    pieces(pair.backend, cache, t, 1, [8])
    state = cache.snapshot(1)
    feed(pair.backend, cache, Tokens(pair, layer, 1, 4, t.sinks), [1])
    cache.reset(1)
    feed(pair.backend, cache, Tokens(pair, layer, 1, 10, t.sinks), [1])
    rest = t.part(slice(None), slice(8, 13))
    for kept, slot in ((cache, 0), (second, 1), (cache, 1)):
        kept.restore(slot, state)
        assert kept.lengths[slot] == 8, "restore does not bring the length back"
        pair.close("attention", pieces(pair.backend, kept, rest, slot, [1, 4]), whole[:, 8:])


@case("cache", names=[("plain", "plain", "window"), ("plain", "narrow_values", "head_64")])
def each_layer_keeps_its_own(pair: Pair, names: tuple[str, ...]) -> None:
    """Whether its neighbours look like it or not."""
    layers = [BY_NAME[name] for name in names]
    cache = pair.backend.new_cache([layer.cache for layer in layers], 1, 16)
    data = [Tokens(pair, layer, 1, 11) for layer in layers]
    for start, n in ((0, 6), (6, 1), (7, 4)):
        step = Step(int32(start), int32(n), int32(0), cache=cache)
        for i, t in enumerate(data):
            got = attend(pair.backend, t.part(slice(None), slice(start, start + n)), step, i)
            want = attend(pair.backend, t, Step.whole(1, 11))
            pair.close("attention", got, want[:, start : start + n])
        cache.advance(step.slots, step.lengths)
    equal("lengths", cache.lengths, [11])
    assert cache.nbytes > 0, "nbytes says nothing"


@case("cache", names=[("plain", "window"), ("narrow_values",)])
def bytes_of_another_capacity(pair: Pair, names: tuple[str, ...]) -> None:
    """What plans of memory ask; a cache that grows with the text says nothing of itself either."""
    specs = [BY_NAME[name].cache for name in names]
    small = pair.backend.new_cache(specs, 2, 16)
    for capacity in (16, 48, 4096):
        made = pair.backend.new_cache(specs, 2, capacity)
        equal(f"bytes of {capacity} tokens", small.nbytes_of(capacity), made.nbytes)


@case("cache", dtype=["float16", "bfloat16", "float32"])
def cache_in_another_type(pair: Pair, dtype: str) -> None:
    t = Tokens(pair, PLAIN, 1, 13)
    whole = attend(pair.backend, t, Step.whole(1, 13))
    cache = pair.backend.new_cache([PLAIN.cache], 1, 16, dtype)
    got = pieces(pair.backend, cache, t, 0, [7, 1, 5])
    pair.close("attention", got, whole, tolerance=KEPT[dtype] + pair.tolerance("attention"))


KEPT = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 0.0}  # what rounding keys and values costs


EIGHT = [BY_NAME[name] for name in ("one_kv_head", "narrow_values", "head_64", "all_at_once")]


def eight_bits(ops: Backend, layer: Layer, slots: int = 1, capacity: int = 16) -> Cache:
    return ops.new_cache([layer.cache], slots, capacity, "int8")


@case("int8_cache", layer=[*EIGHT, *LONG], sizes=[(7, 1, 5), (1,) * 13, (13,)])
def eight_bits_by_token_and_head(pair: Pair, layer: Layer, sizes: tuple[int, ...]) -> None:
    """Each token's numbers of a head have a scale of their own: heads, tokens, keys and values of very different sizes
    spoil nothing of each other."""
    t = Tokens(pair, layer, 1, 13)
    loud = np.float32(10.0) ** pair.random.integers(-2, 2, (1, 13, layer.kv_heads, 1)).astype(np.float32)
    t.k, t.v = pair.rounded(t.k * np.sqrt(loud / 10)), pair.rounded(t.v * loud)
    got, want = (pieces(ops, eight_bits(ops, layer), t, 0, sizes) for ops in (pair.backend, pair.reference))
    pair.close("attention", got, want, tolerance=ROUNDED + pair.tolerance("attention"))
    whole = attend(pair.reference, t, Step.whole(1, 13))
    assert np.sqrt(np.mean((got - whole) ** 2) / np.mean(whole**2)) < 0.02, "this is worse than 8 bits"


ROUNDED = 2e-3  # a code may fall to the other side of a half: one of 127 steps, in one of many numbers


@case("int8_cache", layer=LONG)
def eight_bits_of_long_texts(pair: Pair, layer: Layer) -> None:
    t = Tokens(pair, layer, 1, 301)
    caches = [eight_bits(ops, layer, capacity=301) for ops in (pair.backend, pair.reference)]
    sizes = [127, 1, 1, 66, 1, 104, 1]
    got, want = (pieces(ops, c, t, 0, sizes) for ops, c in zip((pair.backend, pair.reference), caches, strict=True))
    pair.close("attention", got, want, tolerance=ROUNDED + pair.tolerance("attention"))
    half = pair.backend.new_cache([layer.cache], 1, 301, "float16")
    pieces(pair.backend, half, t, 0, [301])
    assert caches[0].nbytes < 0.65 * half.nbytes, f"{caches[0].nbytes} bytes, {half.nbytes} in 16 bits"


@case("int8_cache", layer=EIGHT)
def eight_bits_there_and_back(pair: Pair, layer: Layer) -> None:
    """Truncated, taken from one slot to another of a second cache, and gone on with: as if nothing had happened."""
    t, astray = (Tokens(pair, layer, 1, 13) for _ in range(2))
    t.sinks = astray.sinks
    want = pieces(pair.reference, eight_bits(pair.reference, layer), t, 0, [13])
    cache, second = (eight_bits(pair.backend, layer, slots=2) for _ in range(2))
    pieces(pair.backend, cache, t, 1, [6])
    astray.k[:], astray.v[:] = 30.0, 30.0
    feed(pair.backend, cache, astray.part(slice(None), slice(0, 5)), [1])
    held = cache.truncate(1, 6)
    pieces(pair.backend, cache, t.part(slice(None), slice(held, 9)), 1, [9 - held])
    state = cache.snapshot(1)
    feed(pair.backend, cache, astray.part(slice(None), slice(0, 3)), [1])
    for kept, slot in ((cache, 1), (second, 0)):
        kept.restore(slot, state)
        got = pieces(pair.backend, kept, t.part(slice(None), slice(9, 13)), slot, [1, 3])
        pair.close("attention", got, want[:, 9:], tolerance=ROUNDED + pair.tolerance("attention"))


@case("cache")
def more_than_fits(pair: Pair) -> None:
    """An error for people, before anything is written outside."""
    cache = one_layer(pair.backend, PLAIN, capacity=8)
    pieces(pair.backend, cache, Tokens(pair, PLAIN, 1, 6), 0, [6])
    try:
        feed(pair.backend, cache, Tokens(pair, PLAIN, 1, 3), [0])
    except OnDeviceError:
        return
    raise AssertionError("9 tokens were accepted by a cache of 8")


@case("cache")
def an_unknown_type(pair: Pair) -> None:
    try:
        pair.backend.new_cache([PLAIN.cache], 1, 8, "flaot16")
    except OnDeviceError:
        return
    raise AssertionError("a cache of 'flaot16' was made")
