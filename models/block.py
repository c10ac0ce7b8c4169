"""One layer: attention or another mixer, then feed-forward, each added to the stream it read."""

from __future__ import annotations

from ..backends.base import A, Step
from .attention import attention, latent_attention
from .config import AttentionConfig, ConvolutionConfig, DeltaConfig, LatentConfig, LayerConfig
from .feed_forward import feed_forward
from .mixers import convolution, delta
from .scope import Scope

MIXERS = {
    AttentionConfig: ("attn", attention),
    LatentConfig: ("latent", latent_attention),
    ConvolutionConfig: ("conv", convolution),
    DeltaConfig: ("delta", delta),
}


def block(p: Scope, cfg: LayerConfig, x: A, step: Step) -> A:
    """x [B, T, D] -> [B, T, D]"""
    read = p.norm("attn_norm", x) if cfg.pre_norms else x
    name, mix = MIXERS[type(cfg.mixer)]
    h = mix(p.at(name), cfg.mixer, read, step)
    stream = _added(x, p.norm("attn_post_norm", h) if cfg.post_norms else h, cfg)
    if not cfg.shared_norm:
        read = x if cfg.parallel else stream
        read = p.norm("mlp_norm", read) if cfg.pre_norms else read
    h = feed_forward(p, cfg.feed_forward, read)
    stream = _added(stream, p.norm("mlp_post_norm", h) if cfg.post_norms else h, cfg)
    return p.tap("output", stream)


def _added(stream: A, h: A, cfg: LayerConfig) -> A:
    return stream + (h if cfg.residual_scale == 1.0 else h * cfg.residual_scale)
