"""One layer: attention, then feed-forward, each added to the stream it read."""

from __future__ import annotations

from ..backends.base import A, Step
from .attention import attention
from .config import LayerConfig
from .feed_forward import feed_forward
from .scope import Scope


def block(p: Scope, cfg: LayerConfig, x: A, step: Step) -> A:
    """x [B, T, D] -> [B, T, D]"""
    h = attention(p.at("attn"), cfg.attention, p.norm("attn_norm", x), step)
    x = x + (p.norm("attn_post_norm", h) if cfg.post_norms else h)
    h = feed_forward(p, cfg.feed_forward, p.norm("mlp_norm", x))
    x = x + (p.norm("mlp_post_norm", h) if cfg.post_norms else h)
    return p.tap("output", x)
