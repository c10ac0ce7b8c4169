"""Mixtures of experts on torch: the election, and products expert by expert."""

from __future__ import annotations

from typing import Any

import torch

from ..base import RouteRule, Routing

FEW = 16  # pairs of token and expert: up to here their matrices are gathered, without asking the host who was elected

SCORES = {"softmax": lambda x: x.softmax(dim=-1), "sigmoid": torch.sigmoid, "sparsemixer": lambda x: x}


class TorchRouting(Routing):
    """`groups` sorts the flat (token, expert) pairs by expert, made on first use."""

    def __init__(self, ids: torch.Tensor, gates: torch.Tensor, rule: RouteRule):
        self.ids, self.gates, self.rule = ids, gates, rule
        self._groups: tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]] | None = None

    def groups(self, experts: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """The pairs' order by expert, the way back, and (expert, how many pairs) in turn. Waits for the device."""
        if self._groups is None:
            flat = self.ids.flatten()
            order = flat.argsort(stable=True)
            counts = torch.bincount(flat, minlength=experts).tolist()
            self._groups = order, order.argsort(), [(e, n) for e, n in enumerate(counts) if n]
        return self._groups


class TorchExperts:
    """A mixin of CudaBackend. recording: the host can't be asked just now."""

    recording: bool

    def route(self, logits: torch.Tensor, k: int, rule: RouteRule, bias: Any = None) -> TorchRouting:
        logits = logits.float()
        scores = SCORES[rule.scoring](logits)
        ballots = scores.detach() if bias is None else scores.detach() + self.weight(bias).numbers(torch.float32)
        if rule.groups > 1:
            ballots = _best_groups(ballots, rule)
        ids = ballots.argsort(dim=-1, descending=True, stable=True)[:, :k]
        gates = _rival_shares(logits, ids, rule.jitter) if rule.scoring == "sparsemixer" else scores.gather(-1, ids)
        if rule.renormalise:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return TorchRouting(ids.int(), gates * rule.scale, rule)

    def expert_linear(self, x: torch.Tensor, weight: Any, routing: TorchRouting, bias: Any = None) -> torch.Tensor:
        w, ids = self.weight(weight), routing.ids
        n, k = ids.shape
        if routing.rule.gate_on_input and x.ndim == 2:
            x = x[:, None] * routing.gates[..., None].to(x.dtype)
        pairs = x if x.ndim == 3 else x[:, None].expand(n, k, x.shape[-1])
        pairs = pairs.reshape(n * k, -1)
        if n * k <= FEW or self.recording:
            y = torch.bmm(w.rows(ids.flatten(), x.dtype), pairs[..., None])[..., 0]
        else:
            order, back, groups = routing.groups(w.shape[0])
            parts = pairs[order].split([count for _, count in groups])
            y = torch.cat([w.expert(e).apply(p, None) for p, (e, _) in zip(parts, groups, strict=True)])[back]
        y = y.reshape(n, k, -1)
        return y if bias is None else y + self.weight(bias).rows(ids, y.dtype)

    def combine(self, y: torch.Tensor, routing: TorchRouting) -> torch.Tensor:
        if routing.rule.gate_on_input:
            return y.sum(dim=1)
        return (y * routing.gates[..., None]).sum(dim=1).to(y.dtype)


def _rival_shares(logits: torch.Tensor, ids: torch.Tensor, jitter: float) -> torch.Tensor:
    """The sparsemixer's gates (see RouteRule), [N, k]."""
    left, gates = logits, []
    for elected in ids.unbind(-1):
        best = logits.gather(-1, elected[:, None])
        near = best - left <= 2 * jitter * logits.abs().maximum(best)
        gates.append(left.masked_fill(~near, -torch.inf).softmax(dim=-1).gather(-1, elected[:, None]))
        left = left.scatter(-1, elected[:, None], -torch.inf)
    return torch.cat(gates, dim=-1)


def _best_groups(ballots: torch.Tensor, rule: RouteRule) -> torch.Tensor:
    """Only the experts of the best groups keep their scores; the others get -inf."""
    grouped = ballots.unflatten(-1, (rule.groups, -1))
    strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    losers = strength.argsort(dim=-1, descending=True, stable=True)[:, rule.top_groups :]
    out = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, losers, True)
    return grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
