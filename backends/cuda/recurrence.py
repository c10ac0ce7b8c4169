"""Mixers with a state on torch: short convolution and gated delta rule, in float32, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..base import Step
from ..recurrence import TINY


class TorchRecurrence:
    """A mixin of CudaBackend."""

    def short_convolution(self, x: torch.Tensor, weight: Any, bias: Any, step: Step, layer: int) -> torch.Tensor:
        w, (rows, tokens, _) = self._float32(weight), x.shape
        places, back = self._where(step, tokens), w.shape[1] - 1
        before, states = self._state(step, layer, places, "conv")
        if before is None:
            before = x.new_zeros((rows, back, len(w)), dtype=torch.float32)
        padded = torch.cat([before, x.float()], dim=1)
        windows = padded.unfold(1, back + 1, 1)  # [B, T, C, taps]
        if step.segments is not None:
            windows = windows * _same_document(places.segments, back)[:, :, None]
        if states is not None:
            last = places.lengths.long()[:, None] + torch.arange(back, device=x.device)  # of the real tokens
            states[places.slot_ids] = padded.gather(1, last[:, :, None].expand(-1, -1, len(w)))
        y = (windows * w).sum(dim=-1)
        return (y if bias is None else y + self._float32(bias)).to(x.dtype)

    def gated_delta(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rate: Any,
        shift: Any, step: Step, layer: int,
    ) -> torch.Tensor:  # fmt: skip
        (rows, tokens, heads, dv), dk = v.shape, q.shape[-1]
        places = self._where(step, tokens)
        q, k = (_unit(x.float()).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
        q, values = q * dk**-0.5, v.float()
        keep = torch.exp(-self._float32(rate).exp() * F.softplus(a.float() + self._float32(shift)))
        real = (torch.arange(tokens, device=v.device) < places.lengths[:, None])[:, :, None]
        keep, learn = torch.where(real, keep, 1.0), torch.where(real, b.float().sigmoid(), 0.0)
        if step.segments is not None:
            keep = keep * _same_document(places.segments, 1)[:, :, :1]
        memory, states = self._state(step, layer, places, "memory")
        if memory is None:
            memory = values.new_zeros((rows, heads, dk, dv))
        read = []
        for t in range(tokens):
            memory = memory * keep[:, t, :, None, None]
            lacking = values[:, t] - (k[:, t, :, None] @ memory)[:, :, 0]
            memory = memory + k[:, t, :, :, None] * (lacking * learn[:, t, :, None])[:, :, None]
            read.append((q[:, t, :, None] @ memory)[:, :, 0])
        if states is not None:
            states[places.slot_ids] = memory
        return torch.stack(read, dim=1).to(v.dtype)

    def _float32(self, w: Any) -> torch.Tensor:
        return w.float() if isinstance(w, torch.Tensor) else w.numbers(torch.float32)

    def _state(self, step: Step, layer: int, places: Any, part: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A layer's state before the step, by row, and where the one after it goes; None twice without a cache."""
        if step.cache is None:
            return None, None
        places.check(step.cache.capacity)
        states = step.cache.states[layer][part]
        begun = (places.starts > 0).view(-1, *[1] * (states.ndim - 1))
        return states[places.slot_ids] * begun, states


def _same_document(segments: torch.Tensor, back: int) -> torch.Tensor:
    """segments [B, T] -> float32 [B, T, back + 1]: whether the token `back`, …, 1, 0 places earlier is of the same
    document; places before the row count as same."""
    padded = torch.cat([segments[:, :1].expand(-1, back), segments], dim=1)
    return (padded.unfold(1, back + 1, 1) == segments[:, :, None]).float()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + TINY)
