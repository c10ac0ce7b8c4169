"""What training needs, on torch's own automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ... import noise
from .. import moments
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
        return 1 / torch.linalg.vector_norm(adapted, dim=-1)

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
        rate: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0, bits: int = 32,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
        fresh, kept = {}, {}
        for name, param in params.items():
            packed = moments.packed(param.numel(), bits)
            grad = grads[name].float()
            m, v = _moments(state, name, param, packed)
            m = betas[0] * m + (1 - betas[0]) * grad
            v = betas[1] * v + (1 - betas[1]) * grad * grad
            moved = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
            fresh[name] = (param.float() * (1 - rate * decay) - rate * moved).to(param.dtype)
            values = (*_compress(m, True), *_compress(v.sqrt(), False)) if packed else (m, v)
            parts = moments.PACKED if packed else moments.PLAIN
            kept |= {f"{name}.{part}": a for part, a in zip(parts, values, strict=True)}
        return fresh, kept


def _detached(value: Any) -> Any:
    """aux without its graph, which would keep the whole pass alive."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: _detached(v) for name, v in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (list, tuple) else value


def _moments(
    state: Mapping[str, torch.Tensor], name: str, param: torch.Tensor, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second, float32."""
    if not state:
        blank = torch.zeros_like(param, dtype=torch.float32)
        return blank, blank
    found = [state[f"{name}.{part}"] for part in (moments.PACKED if packed else moments.PLAIN)]
    if not packed:
        return found[0], found[1]
    return _expand(found[0], found[1], param.shape, True), _expand(found[2], found[3], param.shape, False).square()


def _compress(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`moments.compress`"""
    edges = torch.from_numpy(moments.code(7 if signed else 8).edges[1:-1]).to(values.device)
    padding = moments.blocks(values.numel()) * moments.BLOCK - values.numel()
    rows = torch.nn.functional.pad(values.reshape(-1), (0, padding)).reshape(-1, moments.BLOCK)
    scales = rows.abs().amax(dim=1)
    share = rows.abs() * (1 / torch.where(scales == 0, 1.0, scales))[:, None]
    found = torch.bucketize(share, edges, out_int32=True, right=True)
    found = found + 128 * (rows < 0) if signed else found
    return found.to(torch.uint8).reshape(-1).view(torch.int32), scales


def _expand(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    """`moments.expand`"""
    levels = torch.from_numpy(moments.levels(signed)).to(codes.device)
    values = levels[codes.view(torch.uint8).int()].reshape(-1, moments.BLOCK) * scales[:, None]
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)
