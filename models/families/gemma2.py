"""Gemma 2: Gemma with norms around each half of a block, bounded scores and logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import activation, head_dim, layer_count, number, optional, whole
from . import SANDWICH, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    hf = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, **hf}
    return ModelConfig.llama_like(
        {**hf, "head_dim": head_dim(hf, 256)},
        tied=True,
        scale=number(hf, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=optional(number, hf, "attn_logit_softcapping"),
        mlp={"act": activation(hf, "hidden_activation", "gelu_pytorch_tanh")},
        layer={"post_norms": True},
        sliding=lambda layer: layer % 2 == 0,
        embed_scale=whole(hf, "hidden_size") ** 0.5,
        norm_offset=1.0,
        logit_softcap=optional(number, hf, "final_logit_softcapping"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "gemma2", "Gemma2ForCausalLM", hidden_activation="gelu_pytorch_tanh")
    largest = layer_count(hf) == 46  # the 27B model alone scales its scores by width per head
    scalar = whole(hf, "hidden_size") // whole(hf, "num_attention_heads") if largest else head_dim(hf)
    return {"query_pre_attn_scalar": scalar} | hf


gemma2 = Family(
    "gemma2", model_types=("gemma2",), config=config, names=SANDWICH,
    gguf=Gguf("gemma2", gguf.SANDWICH, _from_gguf, arrange=gguf.minus_one),
    models="Gemma 2",
)  # fmt: skip
