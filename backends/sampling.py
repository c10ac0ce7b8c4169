"""Choosing the next token on the host, for backends whose logits are NumPy arrays. `base.SamplingParams` defines it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .base import SamplingParams
from .numerics import log_softmax

Counts = tuple[np.ndarray, np.ndarray]  # ids seen in the prompt, in the answer: [B, V] int32 each


def sample(
    logits: np.ndarray, params: Sequence[SamplingParams], u: np.ndarray, counts: Counts | None, mask: np.ndarray | None,
    draw: Callable[[np.ndarray, SamplingParams, float], int] | None = None,
) -> tuple[np.ndarray, np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:  # fmt: skip
    """logits [B, V] -> ids [B] int32; the chosen ids' log-probabilities [B] and the most likely (ids, logprobs)
    [B, n], or None when no row asks for them. draw: a faster `draw_one`."""
    draw = draw or draw_one
    ids = np.empty(len(params), np.int32)
    for row, p in enumerate(params):
        scores = penalised(logits[row], p, None if counts is None else (counts[0][row], counts[1][row]))
        if mask is not None:
            scores = scores + mask[row]
        ids[row] = draw(scores, p, float(u[row]))
    n = max(p.top_logprobs for p in params)
    if n == 0:
        return ids, None, None
    logprobs = log_softmax(logits)
    top = np.argsort(-logprobs, axis=-1, kind="stable")[:, :n]
    chosen = np.take_along_axis(logprobs, ids[:, None], -1)[:, 0]
    return ids, chosen, (top.astype(np.int32), np.take_along_axis(logprobs, top, -1))


def penalised(logits: np.ndarray, p: SamplingParams, counts: Counts | None) -> np.ndarray:
    """logits [V] after the repetition, presence and frequency penalties; the input is left alone."""
    if counts is None or (p.repetition == 1.0 and p.presence == 0.0 and p.frequency == 0.0):
        return logits
    prompt, answer = counts
    seen = np.flatnonzero((prompt > 0) | (answer > 0))
    scores = logits.copy()
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / p.repetition, scores[seen] * p.repetition)
    scores[seen] -= p.presence * (answer[seen] > 0) + p.frequency * answer[seen]
    return scores


def draw_one(scores: np.ndarray, p: SamplingParams, u: float) -> int:
    """One id from scores [V]: temperature, top-k, top-p, min-p, then the first id at which the running sum exceeds u.

    Each filter keeps the likelier tokens; among equals, the lower ids. The most likely token always stays; at a
    temperature of 0 it is the one.
    """
    if p.temperature <= 0:
        return int(scores.argmax())
    ids = best(scores, p.top_k) if 0 < p.top_k < scores.size else np.arange(scores.size)
    logits = scores[ids].astype(np.float64) / p.temperature
    weights = np.exp(logits - logits.max())
    if p.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept = np.sort(order[before < max(p.top_p, 1e-9) * weights.sum()])
        ids, weights = ids[kept], weights[kept]
    if p.min_p > 0.0:
        kept = weights >= p.min_p  # the most likely token has weight 1
        ids, weights = ids[kept], weights[kept]
    running = np.cumsum(weights)
    return int(ids[min(np.searchsorted(running, u * running[-1], side="right"), ids.size - 1)])


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest scores, in rising order of id; among equals the lower ids win."""
    threshold = np.partition(scores, -k)[-k]
    above, equal = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    return np.sort(np.concatenate([above, equal[: k - above.size]]))
