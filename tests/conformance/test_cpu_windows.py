"""Layers with a window keep little more than it, on the cpu backend; answers are those of a cache that keeps all."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.base import AttentionSpec, LayerCache, Step
from ondevice.backends.cpu import create
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.random import random_weights
from ondevice.runtime import memory
from ondevice.runtime.engine import Engine, GenerateOptions, Prefilled, Token

_native = pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")

H, K, D, DV = 6, 2, 24, 20
BACK, AHEAD = 20, 48


@pytest.fixture(autouse=True)
def small_rooms(monkeypatch):
    monkeypatch.setattr("ondevice.backends.cpu.cache.BACK", BACK)
    monkeypatch.setattr("ondevice.backends.cpu.cache.AHEAD", AHEAD)


@pytest.fixture(scope="module", params=_native.variants())
def ops(request):
    return create(exact=True, kernels=request.param, threads=2)


class Text:
    """Queries, keys and values of tokens, made up by where they stand; attended to through a cache."""

    def __init__(self, ops, spec: AttentionSpec, tokens: int, seed: int = 0):
        self.ops, self.spec, random = ops, spec, np.random.default_rng(seed)
        self.q, self.k, self.v = (
            random.standard_normal((tokens, n, d)).astype(np.float32) for n, d in ((H, D), (K, D), (K, DV))
        )

    def cache(self, window: int | None, dtype: str = "float32", capacity: int = 700):
        return self.ops.new_cache([LayerCache(K, D, DV, window)], 3, capacity, dtype)


def attend(texts, slots, cache, counts) -> list[np.ndarray]:
    """So many more tokens of each text in one step, padded; cache.lengths say from where."""
    most, spec, ops = max(counts), texts[0].spec, texts[0].ops
    starts = cache.lengths[slots].copy()

    def rows(name):
        part = np.zeros((len(texts), most, *getattr(texts[0], name).shape[1:]), np.float32)
        for row, text, start, count in zip(part, texts, starts, counts, strict=True):
            row[:count] = getattr(text, name)[start : start + count]
        return ops.array(part)

    step = Step(starts, np.array(counts, np.int32), np.array(slots, np.int32), cache=cache)
    out = ops.numpy(ops.attention(rows("q"), rows("k"), rows("v"), None, spec, step, 0))
    cache.advance(step.slots, step.lengths)
    return [row[:count] for row, count in zip(out, counts, strict=True)]


SPECS = {
    "short": AttentionSpec(0.2, window=5),
    "odd": AttentionSpec(0.2, window=37),
    "long, soft": AttentionSpec(0.2, window=130, softcap=5.0),
    "itself": AttentionSpec(0.2, window=1),
    "chunks": AttentionSpec(0.2, chunk=32),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_long_texts_see_what_they_would_in_a_whole_cache(ops, spec, dtype):
    """In steps of any size, larger than all there is room for among them; two texts of different lengths at once."""
    texts = [Text(ops, spec, 600, seed) for seed in (1, 2)]
    window = spec.window or spec.chunk
    bounded, whole = texts[0].cache(window, dtype), texts[0].cache(None, dtype)
    for counts in [(7, 3), *[(1, 1)] * 70, (90, 0), (64, 200), (1, 1), (300, 5), *[(1, 1)] * 30, (0, 150)]:
        got, want = (attend(texts, [2, 0], cache, counts) for cache in (bounded, whole))
        for a, b in zip(got, want, strict=True):
            assert np.allclose(a, b, atol=2e-6)
    places = bounded.keys[0].shape[2] * 16
    assert bounded.lengths.tolist() == [459, 0, 562] and bounded.bases[0][2] >= 562 - places
    assert window + BACK + AHEAD <= places < window + BACK + AHEAD + 16
    assert bounded.nbytes < whole.nbytes and bounded.nbytes_of(9000) == bounded.nbytes


def test_going_back(ops):
    """As far as is promised, always; to where the window is lost, never: then from the beginning, without a trace."""
    spec = AttentionSpec(0.2, window=33)
    text, random = Text(ops, spec, 700), np.random.default_rng(5)
    bounded, whole = text.cache(33), text.cache(None)
    lost = 0
    for _ in range(300):
        held = int(bounded.lengths[1])
        back = held - min(held, int(random.choice([0, 1, 5, BACK, 40, 90])))
        got = bounded.truncate(1, back)
        assert got == back or (got == 0 and held - back > BACK), "it could have gone back so far"
        lost += got != back
        whole.truncate(1, got)
        count = int(random.choice([1, 1, 16, 64, 90]))
        if bounded.lengths[1] + count <= 700:
            for a, b in zip(*(attend([text], [1], cache, [count]) for cache in (bounded, whole)), strict=True):
                assert np.allclose(a, b, atol=2e-6)
    assert lost > 2


def test_the_last_place_to_go_back_to(ops):
    """Where the first token of its window is the first that is held; one token further is too far."""
    text = Text(ops, AttentionSpec(0.2, window=33), 300)
    cache, whole = text.cache(33), text.cache(None)
    attend([text], [0], cache, [210]), attend([text], [0], whole, [210])
    edge = int(cache.bases[0][0]) + 32
    assert 32 < edge <= 210 - BACK
    states = cache.snapshot(0), whole.snapshot(0)
    for back, got in ((edge, edge), (edge - 1, 0)):
        for kept, state in zip((cache, whole), states, strict=True):
            kept.restore(0, state)
        assert cache.truncate(0, back) == got
        whole.truncate(0, got)
        assert np.allclose(*(attend([text], [0], kept, [1])[0] for kept in (cache, whole)), atol=2e-6)


def test_what_is_not_held_is_not_guessed(ops):
    text = Text(ops, AttentionSpec(0.2, window=5), 300)
    cache = text.cache(5)
    attend([text], [0], cache, [300])
    cache.lengths[0] = 100  # as if it had been truncated
    with pytest.raises(ValueError, match="truncate the cache first"):
        attend([text], [0], cache, [1])


@pytest.mark.parametrize("capacity", [700, 400])
def test_a_copy_goes_its_own_way(ops, capacity):
    """Also in a cache of another capacity, with room for all or not."""
    text = Text(ops, AttentionSpec(0.2, window=37), 390)
    cache, whole = text.cache(37), text.cache(None)
    attend([text], [1], cache, [250])
    attend([text], [1], whole, [250])
    state, want = cache.snapshot(1), attend([text], [1], whole, [60])[0]
    attend([text], [1], cache, [140])
    other = text.cache(37, capacity=capacity)
    attend([text], [2], other, [390])
    for kept, slot in ((other, 2), (cache, 0), (cache, 1)):
        kept.restore(slot, state)
        assert kept.lengths[slot] == 250
        assert np.allclose(attend([text], [slot], kept, [60])[0], want, atol=2e-6)
        assert kept.truncate(slot, 310 - BACK) == 310 - BACK and kept.truncate(slot, 150) == 0


def test_a_copy_in_a_cache_that_has_room_for_all(ops):
    """Of a text whose beginning is not held any more."""
    text = Text(ops, AttentionSpec(0.2, window=37), 120)
    cache, whole, other = text.cache(37), text.cache(None), text.cache(37, capacity=108)
    attend([text], [1], cache, [113]), attend([text], [1], whole, [100])
    assert cache.bases[0][1] and cache.truncate(1, 100) == 100
    other.restore(0, cache.snapshot(1))
    assert np.allclose(attend([text], [0], other, [8])[0], attend([text], [1], whole, [8])[0], atol=2e-6)
    assert other.truncate(0, 50) == 0
    assert np.allclose(attend([text], [0], other, [100])[0], attend([text], [2], whole, [100])[0], atol=2e-6)


CONFIG = ModelConfig.llama_like({
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "intermediate_size": 48, "max_position_embeddings": 4000, "sliding_window": 11,
}, sliding=lambda layer: layer != 1)  # fmt: skip


@pytest.fixture
def engine():
    ops = create(threads=2)
    return Engine(Decoder(CONFIG, ops, random_weights(CONFIG, ops, 32)), 2000)


def answer(engine, prompt, tokens):
    events = list(engine.generate(prompt, GenerateOptions(tokens)))
    return next(e.reused for e in events if isinstance(e, Prefilled)), [e.id for e in events if isinstance(e, Token)]


def test_a_conversation_goes_on_as_with_a_whole_cache(engine, monkeypatch):
    """Decoded by the recorded plan; prefixes are reused where their windows are held, and read again where not."""
    bounded = engine
    monkeypatch.setattr("ondevice.backends.cpu.cache.BACK", 5000)
    whole = Engine(engine.decoder, 2000)
    assert bounded.cache.nbytes < 0.6 * whole.cache.nbytes
    monkeypatch.setattr("ondevice.backends.cpu.cache.BACK", BACK)
    ids, reused = np.random.default_rng(3).integers(0, 50, 1200).tolist(), []
    for prompt in (ids[:5], ids[:300], ids[:290], [*ids[:300], 1], ids[:100], ids[:900], ids[:890] + ids[:99]):
        (kept, got), (_, want) = answer(bounded, prompt, 10), answer(whole, prompt, 10)
        assert got == want
        reused.append(kept)
    assert bounded.ops.compiled.startswith("a plan of")
    assert reused == [0, 5, 289, 290, 0, 100, 890]
    assert answer(bounded, ids[:600], 300) == (0, answer(whole, ids[:600], 300)[1])


def test_a_text_is_shortened_by_a_little_at_no_cost(engine):
    ids = np.random.default_rng(3).integers(0, 50, 1000).tolist()
    answer(engine, ids, 1)
    assert answer(engine, [*ids[: 1000 - BACK], 7], 1)[0] == 1000 - BACK


def test_memory_is_planned_for_as_it_is_taken(engine, monkeypatch):
    for context in (16, 64, 500, 2000):
        taken = engine.decoder.new_cache(1, context).nbytes
        assert memory.cache_bytes(CONFIG, engine.ops, context) == taken
    planned = memory.cache_bytes(CONFIG, engine.ops, 4000)
    monkeypatch.setattr("ondevice.backends.cpu.cache.BACK", 5000)
    assert planned < 0.4 * memory.cache_bytes(CONFIG, engine.ops, 4000)
