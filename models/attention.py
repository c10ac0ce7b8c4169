"""Attention with grouped heads: every token asks (q), every earlier token offers (k) and answers (v)."""

from __future__ import annotations

from ..backends.base import A, Step
from .config import AttentionConfig
from .scope import Scope


def attention(p: Scope, cfg: AttentionConfig, x: A, step: Step) -> A:
    """x [B, T, D] -> [B, T, D]"""
    B, T, _ = x.shape
    q, k, v = qkv(p, cfg, x)  # [B, T, H, d], [B, T, K, d], [B, T, K, d]
    if cfg.rope:
        freqs, scale, interleaved = p.ropes[cfg.rope]
        q, k = (p.ops.rope(t, step, freqs, interleaved, scale) for t in (q, k))
    p.tap("q", q), p.tap("k", k)
    y = p.ops.attention(q, k, v, None, cfg.spec, step, p.layer)
    return p.linear("o", y.reshape(B, T, cfg.heads * cfg.head_dim))


def qkv(p: Scope, cfg: AttentionConfig, x: A) -> tuple[A, A, A]:
    """x [B, T, D] -> queries, keys and values by head, normed where the family does so"""
    (B, T, _), d, group = x.shape, cfg.head_dim, cfg.heads // cfg.kv_heads
    if cfg.qkv == "grouped":
        heads = p.linear("qkv", x).reshape(B, T, cfg.kv_heads, (group + 2) * d)
        q, k, v = p.ops.split(heads, (group * d, d, d))
    elif cfg.qkv == "fused":
        q, k, v = p.ops.split(p.linear("qkv", x), (cfg.heads * d, cfg.kv_heads * d, cfg.kv_heads * d))
    else:
        q, k, v = p.linear("q", x), p.linear("k", x), p.linear("v", x)
    if cfg.qk_norm == "width":
        q, k = p.norm("q_norm", q), p.norm("k_norm", k)
    q, k, v = (t.reshape(B, T, heads, d) for t, heads in ((q, cfg.heads), (k, cfg.kv_heads), (v, cfg.kv_heads)))
    return (p.norm("q_norm", q), p.norm("k_norm", k), v) if cfg.qk_norm == "head" else (q, k, v)
