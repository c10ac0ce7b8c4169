"""What mixes tokens where a layer has no attention: a short convolution, or the memory of a gated delta rule."""

from __future__ import annotations

from ..backends.base import A, Step
from .config import ConvolutionConfig, DeltaConfig
from .scope import Scope


def convolution(p: Scope, cfg: ConvolutionConfig, x: A, step: Step) -> A:
    """Gated before and behind (LFM2). x [B, T, D] -> [B, T, D]"""
    before, behind, x = p.ops.split(p.linear("in", x), (cfg.width,) * 3)
    y = p.ops.short_convolution(before * x, p.weight("taps"), p.bias("taps"), step, p.layer)
    return p.linear("out", behind * y)


def delta(p: Scope, cfg: DeltaConfig, x: A, step: Step) -> A:
    """Gated DeltaNet (Yang et al. 2025): queries, keys and values through a short convolution, then the delta rule, a
    norm of each head and a gate. x [B, T, D] -> [B, T, D]"""
    B, T, _ = x.shape
    mixed = p.ops.short_convolution(p.linear("qkv", x), p.weight("taps"), None, step, p.layer)
    q, k, v = p.ops.split(p.ops.act(mixed, cfg.act), (cfg.keys, cfg.keys, cfg.values))
    q, k = (t.reshape(B, T, cfg.key_heads, cfg.key_dim) for t in (q, k))
    v = v.reshape(B, T, cfg.heads, cfg.value_dim)
    a, b = p.linear("a", x), p.linear("b", x)
    y = p.ops.gated_delta(q, k, v, a, b, p.weight("rate"), p.weight("shift"), step, p.layer)
    y = p.ops.rms_norm(y, p.weight("norm"), p.eps).reshape(B, T, cfg.values)  # gains without the model's offset
    return p.linear("out", p.ops.gated(p.linear("gate", x), y, "silu"))
