"""Attention with grouped heads: every token asks (q), every earlier token offers (k) and answers (v)."""

from __future__ import annotations

from ..backends.base import A, Step
from .config import AttentionConfig
from .scope import Scope


def attention(p: Scope, cfg: AttentionConfig, x: A, step: Step) -> A:
    """x [B, T, D] -> [B, T, D]"""
    B, T, _ = x.shape
    q = p.linear("q", x).reshape(B, T, cfg.heads, cfg.head_dim)  # [B, T, H, d]
    k = p.linear("k", x).reshape(B, T, cfg.kv_heads, cfg.head_dim)  # [B, T, K, d]
    v = p.linear("v", x).reshape(B, T, cfg.kv_heads, cfg.head_dim)
    if cfg.qk_norm:
        q, k = p.norm("q_norm", q), p.norm("k_norm", k)
    if cfg.rope:
        freqs, scale, interleaved = p.ropes[cfg.rope]
        q, k = (p.ops.rope(t, step, freqs, interleaved, scale) for t in (q, k))
    p.tap("q", q), p.tap("k", k)
    y = p.ops.attention(q, k, v, None, cfg.spec, step, p.layer)
    return p.linear("o", y.reshape(B, T, cfg.heads * cfg.head_dim))
