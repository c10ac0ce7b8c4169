"""Choosing the next token without leaving the device: `base.SamplingParams` defines it, `backends/sampling.py` does it
on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..base import Sampled, SamplingParams


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    u: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray] | None,
    mask: np.ndarray | None,
) -> Sampled:
    """logits [B, V] -> ids [B] int32, and log-probabilities where a row asks for them."""
    raw, device = logits.float(), logits.device
    scores = raw
    if counts is not None:
        prompt, answer = (torch.from_numpy(np.array(c)).to(device) for c in counts)
        scores = penalised(scores, params, prompt, answer)
    if mask is not None:
        scores = scores + torch.from_numpy(np.array(mask)).to(device)
    ids = scores.argmax(dim=-1)
    if any(p.temperature > 0 for p in params):
        drawn = draw(scores, params, torch.from_numpy(u.astype(np.float32)).to(device)[:, None])
        ids = torch.where(_column(params, "temperature", device)[:, 0] > 0, drawn, ids)
    n = max(p.top_logprobs for p in params)
    if n == 0:
        return Sampled(ids.int())
    logprobs, top = raw.log_softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    chosen = raw.log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]
    return Sampled(ids.int(), chosen, (top[:, :n].int(), logprobs[:, :n]))


def _column(params: Sequence[SamplingParams], name: str, device: torch.device) -> torch.Tensor:
    """One setting of all rows, [B, 1] float32."""
    return torch.tensor([[getattr(p, name)] for p in params], dtype=torch.float32, device=device)


def penalised(
    scores: torch.Tensor, params: Sequence[SamplingParams], prompt: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """scores [B, V] after the repetition, presence and frequency penalties."""
    repetition, presence, frequency = (
        _column(params, name, scores.device) for name in ("repetition", "presence", "frequency")
    )
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where((prompt > 0) | (answer > 0), repeated, scores)
    return scores - presence * (answer > 0) - frequency * answer


def draw(scores: torch.Tensor, params: Sequence[SamplingParams], u: torch.Tensor) -> torch.Tensor:
    """scores [B, V], u [B, 1] -> ids [B]: temperature, the filters, then the first id at which the running sum of what
    is left exceeds u."""
    temperature = _column(params, "temperature", scores.device)
    temperature = torch.where(temperature > 0, temperature, 1.0)
    weights = ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).exp()  # the likeliest has weight 1
    if any(p.top_k > 0 or p.top_p < 1.0 for p in params):
        weights = likeliest(scores, weights, params)
    if any(p.min_p > 0 for p in params):
        weights = torch.where(weights >= _column(params, "min_p", scores.device), weights, 0.0)
    running = weights.cumsum(dim=-1)
    total = running[:, -1:]
    below_total = total * (1 - 2.0**-23)  # u * total may round up to the total, which no sum exceeds
    return torch.searchsorted(running, torch.minimum(u * total, below_total), right=True)[:, 0]


def likeliest(scores: torch.Tensor, weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """weights [B, V] with zeros where top-k or top-p drop a token; among equals the lower ids stay."""
    vocab, device = scores.shape[-1], scores.device
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab, device=device)
    top_k = torch.tensor([[p.top_k if p.top_k > 0 else vocab] for p in params], device=device)
    top_p = _column(params, "top_p", device)
    ranked = torch.where(ranks < top_k, weights.gather(-1, order), 0.0)
    before = ranked.cumsum(dim=-1) - ranked
    share = top_p.clamp(min=1e-9) * ranked.sum(dim=-1, keepdim=True)
    kept = torch.where((before < share) | (top_p >= 1.0), ranked, 0.0)
    return torch.zeros_like(weights).scatter(-1, order, kept)
