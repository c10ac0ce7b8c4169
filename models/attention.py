"""Attention with grouped heads: every token asks (q), every earlier token offers (k) and answers (v)."""

from __future__ import annotations

from ..backends.base import A, Step
from ..errors import Unsupported
from .config import AttentionConfig, LatentConfig
from .scope import Scope

WHOLE = ("k_up", "v_up")  # read by no linear map: an adapter of theirs has to be worked into the weight


def attention(p: Scope, cfg: AttentionConfig, x: A, step: Step) -> A:
    """x [B, T, D] -> [B, T, D]"""
    B, T, _ = x.shape
    q, k, v, gate = qkv(p, cfg, x)  # [B, T, H, d], [B, T, K, d], [B, T, K, d], [B, T, H * d] or None
    if cfg.rope:
        freqs, scale, interleaved = p.ropes[cfg.rope]
        q, k = (p.ops.rope(t, step, freqs, interleaved, scale) for t in (q, k))
    if cfg.norm_turned:
        q, k = _normed(p, cfg, q, k)
    if s := cfg.sharpness:
        q = q.reshape(B, T, cfg.heads * cfg.head_dim) * p.ops.sharpness(step, T, s.every, s.weight, s.ahead)
        q = q.reshape(B, T, cfg.heads, cfg.head_dim)
    p.tap("q", q), p.tap("k", k)
    y = p.ops.attention(q, k, v, p.weight("sinks") if cfg.sinks else None, cfg.spec, step, p.layer)
    y = y.reshape(B, T, cfg.heads * cfg.head_dim)
    return p.linear("o", y if gate is None else p.ops.gated(gate, y, "sigmoid"))


def qkv(p: Scope, cfg: AttentionConfig, x: A) -> tuple[A, A, A, A | None]:
    """x [B, T, D] -> queries, keys and values by head, normed where the family does so, and the gate if it has one"""
    (B, T, _), d, group = x.shape, cfg.head_dim, cfg.heads // cfg.kv_heads
    if cfg.qkv == "grouped":
        heads = p.linear("qkv", x).reshape(B, T, cfg.kv_heads, (group + 2) * d)
        q, k, v = p.ops.split(heads, (group * d, d, d))
    elif cfg.qkv == "fused":
        q, k, v = p.ops.split(p.linear("qkv", x), (cfg.heads * d, cfg.kv_heads * d, cfg.kv_heads * d))
    else:
        q, k, v = p.linear("q", x), p.linear("k", x), p.linear("v", x)
    gate = None
    if cfg.gated:
        q, gate = (t.reshape(B, T, cfg.heads * d) for t in p.ops.split(q.reshape(B, T, cfg.heads, 2 * d), (d, d)))
    if cfg.qk_norm == "width":
        q, k = p.norm("q_norm", q), p.norm("k_norm", k)
    q, k, v = (t.reshape(B, T, heads, d) for t, heads in ((q, cfg.heads), (k, cfg.kv_heads), (v, cfg.kv_heads)))
    if not cfg.norm_turned:
        q, k = _normed(p, cfg, q, k)
    return q, k, v, gate


def _normed(p: Scope, cfg: AttentionConfig, q: A, k: A) -> tuple[A, A]:
    """Head by head"""
    if cfg.qk_norm == "bare":
        return p.ops.rms_norm(q, None, p.eps), p.ops.rms_norm(k, None, p.eps)
    return (p.norm("q_norm", q), p.norm("k_norm", k)) if cfg.qk_norm in ("head", "heads") else (q, k)


def latent_attention(p: Scope, cfg: LatentConfig, x: A, step: Step) -> A:
    """Keys and values of all heads from one latent, which is what the cache holds (DeepSeek-V2). x [B, T, D]"""
    B, T, _ = x.shape
    q = p.linear("q_up", p.norm("q_norm", p.linear("q_down", x))) if cfg.query_latent else p.linear("q", x)
    q, turning_q = p.ops.split(q.reshape(B, T, cfg.heads, cfg.nope + cfg.turning), (cfg.nope, cfg.turning))
    latent, turning_k = p.ops.split(p.linear("kv_down", x), (cfg.latent, cfg.turning))
    latent = p.norm("kv_norm", latent)  # [B, T, L]
    freqs, scale, interleaved = p.ropes[cfg.rope]
    turning_q = p.ops.rope(turning_q, step, freqs, interleaved, scale)
    turning_k = p.ops.rope(turning_k.reshape(B, T, 1, cfg.turning), step, freqs, interleaved, scale)
    turning_k = turning_k.reshape(B, T, cfg.turning)
    p.tap("q", q), p.tap("turning_q", turning_q), p.tap("latent", latent), p.tap("turning_k", turning_k)
    for name in WHOLE:
        if p.adapters(name):
            raise Unsupported(f"An adapter of latent attention's {name} is not applied here.", "Adapt other weights.")
    wk, wv = p.weight("k_up"), p.weight("v_up")
    y = p.ops.latent_attention(q, turning_q, latent, turning_k, wk, wv, cfg.spec, step, p.layer)
    return p.linear("o", y.reshape(B, T, cfg.heads * cfg.value_dim))
