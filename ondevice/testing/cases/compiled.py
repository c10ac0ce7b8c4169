"""`compile(fn)` gives what `fn` gives, step after step, wherever the tokens go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...backends.base import AttentionSpec, Backend, LayerCache, SamplingParams, Step
from ...errors import ContextFull
from ...tensors import Affine, Tensor, dense
from ..suite import Pair, case, freqs, int32
from .weights import Format

D, H, K, V, LAYERS, CAPACITY = 64, 4, 2, 19, 2, 40
SCALE = 0.08  # of scores: gentle, for sharp attention over random weights doubles every rounding
LESS_THAN_EXACT = 0.05  # what activations in int8 and a cache in float16 may cost in the end, on random weights


def model(pair: Pair, quantized: bool) -> dict[str, Tensor]:
    """A two-layer decoder's weights."""

    def matrix(rows: int, columns: int) -> Tensor:
        if not quantized:
            return pair.weight(rows, columns)
        form = Format(Affine(4, 32, "float16"))
        return form.tensor(pair.random, rows, columns=columns)

    weights = {
        "embed": matrix(V, D),
        "positions": pair.weight(CAPACITY, D),
        "head": matrix(V, D),
        "norm": dense(1 + pair.normal(D, scale=0.1)),
    }
    for i in range(LAYERS):
        sizes = {"q": (D, D), "k": (D // 2, D), "v": (D // 2, D), "o": (D, D)}
        sizes |= {"gate": (96, D), "up": (96, D), "down": (D, 96)}
        weights |= {f"{i}.{name}": matrix(*size) for name, size in sizes.items()}
        weights |= {f"{i}.{name}": dense(1 + pair.normal(D, scale=0.1)) for name in ("norm1", "norm2")}
        weights |= {f"{i}.narrow": pair.weight(3, D), f"{i}.wide": pair.weight(D // 2, 3)}
    return weights


def decoder(
    ops: Backend, weights: dict[str, Tensor], windows: Sequence[int | None] = (None, 5), placed: bool = True
) -> Callable:
    """(ids [B, T], step) -> logits [B, T, V]: everything that a dense decode step does, keys with an adapter. placed:
    with what the host makes of each step."""
    w = {name: ops.prepare(tensor) for name, tensor in weights.items()}
    turns = freqs(D // H)

    def block(i: int, x, step: Step):
        rows, tokens = x.shape[:2]
        h = ops.rms_norm(x, w[f"{i}.norm1"], 1e-5)
        q = ops.linear(h, w[f"{i}.q"]).reshape(rows, tokens, H, D // H)
        k = ops.adapted_linear(h, w[f"{i}.k"], None, w[f"{i}.narrow"], w[f"{i}.wide"], 0.5)
        k = k.reshape(rows, tokens, K, D // H)
        v = ops.linear(h, w[f"{i}.v"]).reshape(rows, tokens, K, D // H)
        q, k = ops.rope(ops.rms_norm(q, None, 1e-5), step, turns), ops.rope(k, step, turns)
        if placed:
            q = q.reshape(rows, tokens, D) * ops.sharpness(step, tokens, 3, 0.4)
            q = q.reshape(rows, tokens, H, D // H)
        y = ops.attention(q, k, v, None, AttentionSpec(SCALE, windows[i]), step, i)
        x = x + ops.linear(y.reshape(rows, tokens, D), w[f"{i}.o"])
        h = ops.rms_norm(x, w[f"{i}.norm2"], 1e-5)
        gated = ops.gated(ops.linear(h, w[f"{i}.gate"]), ops.linear(h, w[f"{i}.up"]), "silu")
        return x + ops.linear(gated, w[f"{i}.down"])

    def forward(ids, step: Step):
        x = ops.embed(w["embed"], ids) * 8.0
        if placed:
            x = x + ops.embed(w["positions"], ops.positions(step, ids.shape[1]))
        for i in range(LAYERS):
            x = block(i, x, step)
        return ops.linear(ops.rms_norm(x, w["norm"], 1e-5), w["head"])

    return forward


def caches(ops: Backend, slots: int, windows: Sequence[int | None] = (None, 5)):
    return ops.new_cache([LayerCache(K, D // H, D // H, window) for window in windows], slots, CAPACITY)


class Walk:
    """Rows of tokens through a decoder and its cache, the logits of each kept."""

    def __init__(self, ops: Backend, rows: int):
        self.ops, self.cache = ops, caches(ops, rows + 1)
        self.said: dict[int, list[int]] = {slot: [] for slot in range(rows + 1)}
        self.logits: list[np.ndarray] = []

    def go(self, run: Callable, ids: np.ndarray, lengths: np.ndarray, slots: np.ndarray) -> None:
        step = Step(self.cache.lengths[slots].copy(), lengths, slots, cache=self.cache)
        logits = self.ops.numpy(run(self.ops.array(ids), step))
        for row, (n, slot) in enumerate(zip(lengths.tolist(), slots.tolist(), strict=True)):
            self.logits.append(logits[row, :n].copy())
            self.said[slot] += ids[row, :n].tolist()
        self.cache.advance(slots, lengths)

    def back(self, run: Callable, slot: int, length: int) -> None:
        """To `length` tokens; what the cache had to drop below that, it is given again."""
        held, before = self.cache.truncate(slot, length), self.said[slot]
        self.said[slot] = before[:held]
        count = len(self.logits)
        if held < length:
            self.go(run, np.array([before[held:length]], np.int32), int32(length - held), int32(slot))
        del self.logits[count:]


def walk(ops: Backend, forward: Callable, prefill: Callable, ids: np.ndarray, turn: int) -> list[np.ndarray]:
    """Prompts of unequal lengths, many steps, back to the middle and on again, the rows in turn in either order."""
    rows = len(ids)
    w, slots, ones = Walk(ops, rows), np.arange(1, rows + 1, dtype=np.int32), np.ones(rows, np.int32)
    w.go(prefill, ids[:, : 3 + rows], np.arange(4, 4 + rows, dtype=np.int32), slots)
    for t in range(turn):
        w.go(forward, ids[:, t : t + 1], ones, slots)
    for slot in slots.tolist():
        w.back(prefill, slot, 6)
    for t in range(turn):
        w.go(forward, ids[:, t + 2 : t + 3], ones, slots[::-1].copy() if t % 2 else slots)
    return w.logits


@case("cache", quantized=[False, True], rows=[1, 3])
def compiled_is_plain(pair: Pair, quantized: bool, rows: int) -> None:
    """The same logits as without, over steps, slots in another order and a truncated cache; and the reference's."""
    weights, ids = model(pair, quantized), pair.ids(V, rows, 16)
    results = []
    for ops, compiled in ((pair.backend, True), (pair.backend, False), (pair.reference, False)):
        forward = decoder(ops, weights)
        run = ops.compile(forward, []) if compiled else forward
        results.append(walk(ops, run, forward, ids, 9))
    fast, plain, want = results
    pair.alike("chain", fast, plain)
    allowed = pair.tolerance("chain")
    pair.alike("chain", plain, want, tolerance=allowed if pair.backend.exact else max(allowed, LESS_THAN_EXACT))


@case("cache")
def two_compiled_at_once(pair: Pair) -> None:
    """Plans don't share what they write to."""
    first, second = (decoder(pair.backend, model(pair, False)) for _ in range(2))
    states = [caches(pair.backend, 1) for _ in range(4)]
    runs = [pair.backend.compile(f, [s]) for f, s in zip((first, second), states, strict=False)]
    got, want = [], []
    for t in range(5):
        ids = pair.ids(V, 1, 1)
        for i, f in enumerate((first, second)):
            step, plain = (Step(int32(t), int32(1), int32(0), cache=c) for c in (states[i], states[i + 2]))
            got.append(pair.backend.numpy(runs[i](pair.backend.array(ids), step)).copy())
            want.append(pair.backend.numpy(f(pair.backend.array(ids), plain)).copy())
    pair.alike("chain", got, want)


@case("cache")
def ids_may_come_from_the_device(pair: Pair) -> None:
    """What `sample` returned goes straight into the next step."""
    ops, weights, texts = pair.backend, model(pair, False), []
    for compiled in (True, False):
        forward, cache = decoder(ops, weights), caches(ops, 1)
        run = (
            ops.compile(lambda ids, step, f=forward: f(ids, step).reshape(1, V), [cache])
            if compiled
            else (lambda ids, step, f=forward: f(ids, step).reshape(1, V))
        )
        ids, text = ops.array(int32(3)), []
        for t in range(8):
            logits = run(ids.reshape(1, 1), Step(int32(t), int32(1), int32(0), cache=cache))
            ids = ops.sample(logits, [SamplingParams()], np.zeros(1, np.float32)).ids
            text.append(int(ops.numpy(ids)[0]))
        texts.append(text)
    assert texts[0] == texts[1], f"compiled: {texts[0]}, plain: {texts[1]}"


FILTERS = {
    "likeliest": SamplingParams(temperature=0.0),
    "all": SamplingParams(temperature=1.3),
    "few": SamplingParams(temperature=1.7, top_k=5, top_p=0.9, min_p=0.05),
}


class Answer:
    """Tokens behind `first`, by single steps or in bursts."""

    def __init__(self, ops: Backend, forward: Callable, first: int, params: SamplingParams, u: np.ndarray):
        self.ops, self.cache, self.params, self.u = ops, caches(ops, 2), params, u
        self.run, self.ids = ops.compile(lambda ids, step: forward(ids, step).reshape(1, V), [self.cache]), [first]

    def _now(self):
        step = Step(self.cache.lengths[1:].copy(), int32(1), int32(1), cache=self.cache)
        return self.ops.array(np.array([self.ids[-1:]], np.int32)), step

    def logits(self) -> np.ndarray:
        return self.ops.numpy(self.run(*self._now())).copy()

    def step(self) -> None:
        at = len(self.ids) - 1
        drawn = self.ops.sample(self.run(*self._now()), [self.params], self.u[at : at + 1])
        self.ids.append(int(self.ops.numpy(drawn.ids)[0]))
        self.cache.advance(int32(1), int32(1))

    def burst(self, count: int, stop: Sequence[int] = ()) -> int | None:
        """How many came."""
        at = len(self.ids) - 1
        drawn = self.run.burst(*self._now(), self.params, self.u[at : at + count], stop)
        if drawn is None:
            return None
        self.ids += drawn.tolist()
        self.cache.advance(int32(1), int32(len(drawn)))
        return len(drawn)


@case("burst", placed=[False, True], filters=list(FILTERS))
def a_burst_is_its_steps(pair: Pair, placed: bool, filters: str) -> None:
    """The same ids and the same cache behind them; it ends where it is told to. What the host has a part in may be
    refused."""
    ops, u = pair.backend, pair.random.random(20, np.float32)
    forward = decoder(ops, model(pair, False), placed=placed)
    steps, bursts = (Answer(ops, forward, 3, FILTERS[filters], u) for _ in range(2))
    for _ in range(16):
        steps.step()
    for count in (1, 4, 3):
        if bursts.burst(count) is None:
            assert placed, "a plain decoder must do"
            return
    assert bursts.ids == steps.ids[:9], f"{bursts.ids} instead of {steps.ids[:9]}"
    last = steps.ids[11]
    wanted = steps.ids[9:].index(last) + 1
    assert bursts.burst(7, {last, V + 1}) == wanted, f"does not end behind {last} of {steps.ids[9:]}"
    bursts.burst(8 - wanted)
    assert bursts.ids == steps.ids, f"{bursts.ids} instead of {steps.ids}, behind a stop"
    pair.alike("chain", bursts.logits(), steps.logits())


@case("burst")
def a_burst_stays_in_its_cache(pair: Pair) -> None:
    """ContextFull before anything is written."""
    forward, u = decoder(pair.backend, model(pair, False), placed=False), np.zeros(60, np.float32)
    answer = Answer(pair.backend, forward, 3, FILTERS["likeliest"], u)
    answer.burst(30)
    try:
        answer.burst(CAPACITY - 29)
    except ContextFull:
        return
    raise AssertionError("tokens went beyond the cache's capacity")
