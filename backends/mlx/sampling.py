"""Choosing the next token without leaving the device: `base.SamplingParams` defines it, `backends/sampling.py` does it
on the host."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..base import Sampled, SamplingParams


def sample(
    logits: mx.array,
    params: Sequence[SamplingParams],
    u: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray] | None,
    mask: np.ndarray | None,
) -> Sampled:
    """logits [B, V] -> ids [B] int32, and log-probabilities where a row asks for them."""
    scores = logits
    if counts is not None:
        scores = penalised(scores.astype(mx.float32), params, mx.array(counts[0]), mx.array(counts[1]))
    if mask is not None:
        scores = scores.astype(mx.float32) + mx.array(mask)
    ids = mx.argmax(scores, axis=-1).astype(mx.int32)
    if any(p.temperature > 0 for p in params):
        drawn = draw(scores.astype(mx.float32), params, mx.array(u.astype(np.float32))[:, None])
        ids = drawn if all(p.temperature > 0 for p in params) else mx.where(_greedy(params), ids, drawn)
    n = max(p.top_logprobs for p in params)
    if n == 0:
        return Sampled(ids)
    raw = logits.astype(mx.float32)
    logprobs = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
    top = mx.argsort(-logprobs, axis=-1)[:, :n].astype(mx.int32)
    chosen = mx.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0]
    return Sampled(ids, chosen, (top, mx.take_along_axis(logprobs, top, axis=-1)))


def _greedy(params: Sequence[SamplingParams]) -> mx.array:
    return mx.array([p.temperature <= 0 for p in params])


def _column(params: Sequence[SamplingParams], name: str) -> mx.array:
    """One setting of all rows, [B, 1] float32."""
    return mx.array([getattr(p, name) for p in params], mx.float32)[:, None]


def penalised(scores: mx.array, params: Sequence[SamplingParams], prompt: mx.array, answer: mx.array) -> mx.array:
    """scores [B, V] after the repetition, presence and frequency penalties."""
    repetition = _column(params, "repetition")
    repeated = mx.where(scores > 0, scores / repetition, scores * repetition)
    scores = mx.where((prompt > 0) | (answer > 0), repeated, scores)
    return scores - _column(params, "presence") * (answer > 0) - _column(params, "frequency") * answer


def draw(scores: mx.array, params: Sequence[SamplingParams], u: mx.array) -> mx.array:
    """scores [B, V], u [B, 1] -> ids [B]: temperature, the filters, then the first id at which the running sum of what
    is left exceeds u."""
    temperature = mx.where(_greedy(params)[:, None], 1.0, _column(params, "temperature"))
    top = mx.max(scores, axis=-1, keepdims=True)
    weights = mx.exp((scores - top) / temperature)  # the most likely token has weight 1
    if any(p.top_k > 0 or p.top_p < 1.0 for p in params):
        weights = likeliest(scores, weights, params)
    if any(p.min_p > 0 for p in params):
        weights = mx.where(weights >= _column(params, "min_p"), weights, 0.0)
    running = mx.cumsum(weights, axis=-1)
    total = running[:, -1:]
    below_total = total * (1 - 2.0**-23)  # u * total may round up to the total, which no sum exceeds
    return mx.argmax(running > mx.minimum(u * total, below_total), axis=-1).astype(mx.int32)


def likeliest(scores: mx.array, weights: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """weights [B, V] with zeros where top-k or top-p drop a token; among equals the lower ids stay."""
    vocab = scores.shape[-1]
    order = mx.argsort(-scores, axis=-1)
    ranked = mx.take_along_axis(weights, order, axis=-1)
    ranks = mx.broadcast_to(mx.arange(vocab), order.shape)
    top_k = mx.array([p.top_k if p.top_k > 0 else vocab for p in params])[:, None]
    ranked = mx.where(ranks < top_k, ranked, 0.0)
    before = mx.cumsum(ranked, axis=-1) - ranked
    share = mx.maximum(_column(params, "top_p"), 1e-9) * mx.sum(ranked, axis=-1, keepdims=True)
    kept = (ranks < top_k) & ((before < share) | (_column(params, "top_p") >= 1.0))
    return mx.put_along_axis(mx.zeros_like(weights), order, mx.where(kept, ranked, 0.0), axis=-1)
