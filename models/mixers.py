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
    mixed, gate, a, b = delta_inputs(p, cfg, x)
    mixed = p.ops.act(p.ops.short_convolution(mixed, p.weight("taps"), None, step, p.layer), cfg.act)
    if cfg.grouped:
        q, k, v = p.ops.split(mixed.reshape(B, T, cfg.key_heads, sum(cfg.group)), cfg.group)
    else:
        q, k, v = p.ops.split(mixed, (cfg.keys, cfg.keys, cfg.values))
    q, k = (t.reshape(B, T, cfg.key_heads, cfg.key_dim) for t in (q, k))
    v = v.reshape(B, T, cfg.heads, cfg.value_dim)
    y = p.ops.gated_delta(q, k, v, a, b, p.weight("rate"), p.weight("shift"), step, p.layer)
    y = p.ops.rms_norm(y, p.weight("norm"), p.eps).reshape(B, T, cfg.values)  # gains without the model's offset
    return p.linear("out", p.ops.gated(gate, y, "silu"))


def delta_inputs(p: Scope, cfg: DeltaConfig, x: A) -> tuple[A, A, A, A]:
    """x [B, T, D] -> q, k and v end to end [B, T, 2 keys + values], or so by key head; the gate [B, T, values]; what
    the memory forgets by and what it learns by, [B, T, heads]"""
    if not cfg.grouped:
        return tuple(p.linear(name, x) for name in ("qkv", "gate", "a", "b"))
    (B, T, _), n, each = x.shape, cfg.key_heads, cfg.heads // cfg.key_heads
    mixed, values = sum(cfg.group), cfg.group[-1]
    qkv, gate = p.ops.split(p.linear("qkv_gate", x).reshape(B, T, n, mixed + values), (mixed, values))
    b, a = p.ops.split(p.linear("b_a", x).reshape(B, T, n, 2 * each), (each, each))
    sizes = n * mixed, cfg.values, cfg.heads, cfg.heads
    return tuple(t.reshape(B, T, size) for t, size in zip((qkv, gate, a, b), sizes, strict=True))
