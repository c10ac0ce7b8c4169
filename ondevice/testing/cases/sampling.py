"""The next token: the same id as the reference for the same draw, filters and penalties in the contract's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...backends.base import Backend, SamplingParams
from ..suite import Pair, case, equal


class Way:
    """Sampling parameters by a name."""

    def __init__(self, name: str, **fields):
        self.name, self.params = name, SamplingParams(**fields)


WAYS = [
    Way("greedy"),
    Way("plain", temperature=1.0),
    Way("hot", temperature=2.5),
    Way("cold", temperature=0.3),
    Way("top_k", temperature=1.0, top_k=5),
    Way("top_one", temperature=1.0, top_k=1),
    Way("top_p", temperature=1.0, top_p=0.7),
    Way("top_p_tiny", temperature=1.0, top_p=1e-4),
    Way("min_p", temperature=1.0, min_p=0.2),
    Way("filters_in_order", temperature=1.7, top_k=12, top_p=0.8, min_p=0.1),
    Way("repetition", temperature=0.8, repetition=1.6),
    Way("presence", temperature=0.8, presence=1.5),
    Way("frequency", temperature=0.8, frequency=0.7),
    Way("everything", temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition=1.3, presence=0.4, frequency=0.3),
    Way("greedy_with_penalties", repetition=1.5, frequency=0.5),
]


NUDGE = 2e-5  # more than float32 loses in a softmax and a running sum over the vocabulary


class Draws:
    """Logits [B, V], draws u [B], counts and mask for one call of `sample`."""

    def __init__(self, pair: Pair, rows: int, vocab: int):
        self.logits = pair.normal(rows, vocab, scale=2.0)
        self.u = pair.random.random(rows, dtype=np.float32)
        seen = pair.random.integers(-4, 4, (2, rows, vocab)).clip(0).astype(np.int32)
        self.counts = (seen[0], seen[1])
        self.mask: np.ndarray | None = None

    def ids(self, ops: Backend, params: Sequence[SamplingParams], logits: np.ndarray | None = None, by: float = 0.0):
        u = np.clip(self.u + np.float32(by), 0, 1 - 1e-6).astype(np.float32)
        given = self.logits if logits is None else logits
        return ops.numpy(ops.sample(ops.array(given), params, u, self.counts, self.mask).ids)

    def firm(self, pair: Pair, params: Sequence[SamplingParams]) -> np.ndarray:
        """Rows whose id does not hang on the last bits: the reference keeps it when logits and draw are nudged."""
        wanted, firm = self.ids(pair.reference, params), np.ones(len(self.u), bool)
        for by in (-NUDGE, NUDGE, 0.0):
            nudged = self.logits + pair.random.uniform(-NUDGE, NUDGE, self.logits.shape).astype(np.float32)
            firm &= self.ids(pair.reference, params, nudged, by) == wanted
        return firm


@case(way=WAYS, vocab=[50, 4099])
def the_same_ids(pair: Pair, way: Way, vocab: int) -> None:
    rows = 24 if vocab < 1000 else 6
    draws, params = Draws(pair, rows, vocab), [way.params] * rows
    firm = draws.firm(pair, params)
    assert firm.sum() >= rows / 3, "the case is badly chosen: nearly every draw hangs on the last bits"
    got, want = (draws.ids(ops, params) for ops in (pair.backend, pair.reference))
    pair.close("sample", got[firm], want[firm])


@case()
def each_row_its_own_way(pair: Pair) -> None:
    draws, params = Draws(pair, len(WAYS), 50), [way.params for way in WAYS]
    firm = draws.firm(pair, params)
    got, want = (draws.ids(ops, params) for ops in (pair.backend, pair.reference))
    pair.close("sample", got[firm], want[firm])


@case()
def bias_and_ban(pair: Pair) -> None:
    """The mask is added: what is at -inf can't be drawn, nor taken greedily."""
    draws = Draws(pair, 8, 50)
    draws.mask = np.zeros((8, 50), np.float32)
    draws.mask[:, 10:] = -np.inf
    draws.mask[:4, 3] = 100.0
    for params in ([SamplingParams(1.5)] * 8, [SamplingParams()] * 8, [SamplingParams(1.0, top_k=30, top_p=0.9)] * 8):
        firm = draws.firm(pair, params)
        got, want = (draws.ids(ops, params) for ops in (pair.backend, pair.reference))
        assert (got < 10).all() and (got[:4] == 3).all(), f"drew {got.tolist()}"
        pair.close("sample", got[firm], want[firm])


@case()
def the_lower_id_among_equals(pair: Pair) -> None:
    """Ties: greedy takes the first, top-k keeps the first."""
    draws = Draws(pair, 4, 50)
    draws.counts = None
    draws.logits[:] = 0.0
    draws.logits[1:, 20] = draws.logits[1:, 7] = 3.0
    draws.logits[2:, 5] = 4.0
    equal("ids", draws.ids(pair.backend, [SamplingParams()] * 4), [0, 7, 5, 5])
    draws.u[:] = 0.999
    equal("ids", draws.ids(pair.backend, [SamplingParams(1.0, top_k=2)] * 4), [1, 20, 7, 7])
    equal("ids", draws.ids(pair.backend, [SamplingParams(1.0, top_k=1)] * 4), [0, 7, 5, 5])


@case()
def the_ends_of_the_draw(pair: Pair) -> None:
    """u 0 gives the first possible id, u just below 1 the last one; never one outside."""
    draws = Draws(pair, 2, 50)
    draws.counts, draws.u = None, np.array([0.0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    draws.mask = np.full((2, 50), -np.inf, np.float32)
    draws.mask[:, 4:41] = 0.0
    draws.logits[:] = 0.0
    equal("ids", draws.ids(pair.backend, [SamplingParams(1.0)] * 2), [4, 40])


@case()
def shares_come_true(pair: Pair) -> None:
    """Over a grid of draws, each id comes as often as its probability says, in the order of the vocabulary."""
    shares = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = np.tile(np.log(shares).astype(np.float32), (200, 1))
    u = ((np.arange(200) + 0.5) / 200).astype(np.float32)
    ops = pair.backend
    ids = ops.numpy(ops.sample(ops.array(logits), [SamplingParams(1.0)] * 200, u).ids)
    assert (np.diff(ids) >= 0).all(), "ids don't follow the order of the vocabulary"
    off = np.abs(np.bincount(ids, minlength=5) / 200 - shares).max()
    assert off <= max(0.01, pair.tolerance("sample")), f"shares are off by {off:.3f}"


@case(vocab=[50, 4099])
def log_probabilities(pair: Pair, vocab: int) -> None:
    """Of the raw logits, whatever the way of choosing; the most likely first, the lower id among equals."""
    draws = Draws(pair, 3, vocab)
    params = [SamplingParams(), SamplingParams(top_logprobs=5), SamplingParams(0.5, top_k=3, repetition=1.4)]
    firm = draws.firm(pair, params)
    results = []
    for ops in (pair.backend, pair.reference):
        sampled = ops.sample(ops.array(draws.logits), params, draws.u, draws.counts)
        results.append([ops.numpy(a) for a in (sampled.ids, sampled.logprobs, *sampled.top)])
    (ids, logprobs, top, top_logprobs), (want_ids, want_logprobs, want_top, want_top_logprobs) = results
    equal("shape and dtype of top", (top.shape, top.dtype), ((3, 5), np.dtype(np.int32)))
    pair.close("sample", ids[firm], want_ids[firm])
    pair.close("sample", logprobs[firm], want_logprobs[firm])
    pair.close("sample", top_logprobs, want_top_logprobs)
    if pair.dtype in ("float32", "float64"):
        pair.close("sample", top, want_top)


@case()
def nothing_asked_nothing_given(pair: Pair) -> None:
    ops = pair.backend
    sampled = ops.sample(ops.array(pair.normal(1, 9)), [SamplingParams()], np.zeros(1, np.float32))
    equal("logprobs and top", (sampled.logprobs, sampled.top), (None, None))


@case()
def a_vocabulary_of_one(pair: Pair) -> None:
    draws = Draws(pair, 1, 1)
    for params in (SamplingParams(), replace(WAYS[13].params, top_logprobs=1)):
        equal("ids", draws.ids(pair.backend, [params]), [0])
