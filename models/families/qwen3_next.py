"""Qwen3-Next: Qwen3.5's layers, whose delta rule has q, k, v and gate of each key head in one matrix; in some layers
the feed-forward may stay plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...backends.base import RouteRule
from ..config import LayerConfig, ModelConfig, MoEConfig, plain_mlp
from ..fields import flag, several, whole
from . import Family
from .qwen3_5 import MOE
from .qwen3_5 import config as qwen3_5

NAMES = MOE | {"layers.{i}.delta.taps": "model.layers.{i}.linear_attn.conv1d.weight|kernels|grouped"}


def config(hf: Mapping) -> ModelConfig:
    every, dense = whole(hf, "decoder_sparse_step", 1), several(hf, "mlp_only_layers", int)
    rule, plain = RouteRule(renormalise=flag(hf, "norm_topk_prob", True)), plain_mlp(hf, bias=False)
    found = qwen3_5(hf)

    def layer(i: int, like: LayerConfig) -> LayerConfig:
        mixer = replace(like.mixer, grouped=True) if hasattr(like.mixer, "grouped") else like.mixer
        moe = replace(like.feed_forward, rule=rule) if isinstance(like.feed_forward, MoEConfig) else plain
        return replace(like, mixer=mixer, feed_forward=plain if i in dense or (i + 1) % every else moe)

    return replace(found, layers=tuple(layer(i, like) for i, like in enumerate(found.layers)))


qwen3_next = Family("qwen3_next", ("qwen3_next",), config, NAMES, models="Qwen3-Next")
