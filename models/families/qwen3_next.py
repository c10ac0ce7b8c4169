"""Qwen3-Next: Qwen3.5's layers, whose delta rule has q, k, v and gate of each key head in one matrix; in some layers
the feed-forward may stay plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...backends.base import RouteRule
from ..config import LayerConfig, ModelConfig, MoEConfig, plain_mlp
from ..fields import flag, several, whole
from . import Family, Gguf, gguf
from .qwen3_5 import GGUF_NAMES as QWEN3_5
from .qwen3_5 import KEYS, MOE, from_gguf
from .qwen3_5 import config as qwen3_5

NAMES = MOE | {"layers.{i}.delta.taps": "model.layers.{i}.linear_attn.conv1d.weight|kernels|grouped"}


def config(hf: Mapping) -> ModelConfig:
    if hf.get("model_type") == "qwen3_5_moe_text":  # a GGUF whose matrices are apart, as Qwen3.5's
        return qwen3_5(hf)
    every, dense = whole(hf, "decoder_sparse_step", 1), several(hf, "mlp_only_layers", int)
    rule, plain = RouteRule(renormalise=flag(hf, "norm_topk_prob", True)), plain_mlp(hf, bias=False)
    found = qwen3_5(hf)

    def layer(i: int, like: LayerConfig) -> LayerConfig:
        mixer = replace(like.mixer, grouped=True) if hasattr(like.mixer, "grouped") else like.mixer
        moe = replace(like.feed_forward, rule=rule) if isinstance(like.feed_forward, MoEConfig) else plain
        return replace(like, mixer=mixer, feed_forward=plain if i in dense or (i + 1) % every else moe)

    return replace(found, layers=tuple(layer(i, like) for i, like in enumerate(found.layers)))


GGUF_NAMES = QWEN3_5 | {
    "layers.{i}.delta.qkv_gate": "blk.{i}.ssm_in.weight",
    "layers.{i}.delta.b_a": "blk.{i}.ssm_ba.weight",
    "layers.{i}.delta.b": "blk.{i}.ssm_ba.weight|paired|first",
    "layers.{i}.delta.a": "blk.{i}.ssm_ba.weight|paired|last",
    "layers.{i}.delta.taps": "blk.{i}.ssm_conv1d.weight",
}


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    together = "blk.0.ssm_in.weight" in checkpoint
    kind = ("qwen3_next", "Qwen3NextForCausalLM") if together else ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
    return from_gguf(metadata, checkpoint, *kind)


ARRANGE, REARRANGE = gguf.memory(gguf.by_key)

qwen3_next = Family(
    "qwen3_next", ("qwen3_next",), config, NAMES,
    Gguf("qwen3next", GGUF_NAMES, _from_gguf, ARRANGE, KEYS, rearrange=REARRANGE), models="Qwen3-Next",
)  # fmt: skip
