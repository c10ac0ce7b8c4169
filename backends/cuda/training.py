"""What training needs, on torch's own automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ... import noise
from .weights import affine


class TorchTraining:
    """A mixin of CudaBackend."""

    def token_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = logits.float().log_softmax(dim=-1)
        if targets.ndim == 2:
            return -(targets.float().softmax(dim=-1) * logprobs).sum(dim=-1)
        picked = logprobs.gather(-1, targets.clamp(min=0).long()[:, None])[:, 0]
        return torch.where(targets >= 0, -picked, 0.0)

    def value_and_grad(self, fn: Callable) -> Callable:
        def differentiated(params: Mapping[str, torch.Tensor], *arrays: Any):
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            with torch.enable_grad():
                loss, aux = fn(leaves, *arrays)
                touched = loss.requires_grad
            found = (
                torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if touched else [None] * len(leaves)
            )
            grads = {
                n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found, strict=True)
            }
            return (loss.detach(), _detached(aux)), {name: g.detach() for name, g in grads.items()}

        return differentiated

    def remat(self, fn: Callable) -> Callable:
        return lambda params, *arrays: checkpoint(fn, params, *arrays, use_reentrant=False, preserve_rng_state=False)

    def dropout(self, x: torch.Tensor, rate: float, seed: int, step: int) -> torch.Tensor:
        kept = noise.uniform(seed, "dropout", step, x.shape) >= rate
        factors = torch.from_numpy(kept.astype(np.float32) / np.float32(1.0 - rate))
        return x * factors.to(x.device, x.dtype)

    @torch.no_grad()
    def inverse_norm(self, weight: Any, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        adapted = self.dequantize(weight) + scale * (up.float() @ down.float())
        return (1 / torch.linalg.vector_norm(adapted, dim=-1)).to(self.dtype)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().sum()

    def quantized(
        self, codes: np.ndarray, scales: torch.Tensor, biases: torch.Tensor, bits: int, group_size: int
    ) -> torch.Tensor:
        words = torch.from_numpy(np.array(codes, np.uint32).view(np.int32)).to(scales.device)
        return affine(words, scales, biases, bits).to(self.dtype)

    @torch.no_grad()
    def adamw(
        self, params: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor], state: dict, step: int,
        rate: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0,
    ) -> tuple[dict[str, torch.Tensor], dict]:  # fmt: skip
        fresh, moments = {}, {}
        for name, param in params.items():
            grad, blank = grads[name].float(), torch.zeros_like(param, dtype=torch.float32)
            m, v = (state.get(f"{name}.{moment}", blank) for moment in "mv")
            m = betas[0] * m + (1 - betas[0]) * grad
            v = betas[1] * v + (1 - betas[1]) * grad * grad
            moved = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
            fresh[name] = (param.float() * (1 - rate * decay) - rate * moved).to(param.dtype)
            moments[f"{name}.m"], moments[f"{name}.v"] = m, v
        return fresh, moments


def _detached(value: Any) -> Any:
    """aux without its graph, which would keep the whole pass alive."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: _detached(v) for name, v in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (list, tuple) else value
