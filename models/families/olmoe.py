"""OLMoE: Llama with experts, and a norm of all heads of q and of k together."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ...errors import Unsupported
from ..config import ModelConfig, routed
from ..fields import flag
from . import LLAMA, Family, Gguf, experts, gguf

MODULE = "model.layers.{i}.mlp"
NAMES = LLAMA | experts(MODULE) | {"layers.{i}.moe.router": f"{MODULE}.gate.weight"}


def config(hf: Mapping) -> ModelConfig:
    if hf.get("clip_qkv") is not None:
        raise Unsupported("This OLMoE clips q, k and v (clip_qkv), which is not computed here.", "Take OLMoE-1B-7B.")
    rule = RouteRule(renormalise=flag(hf, "norm_topk_prob"))
    moe = routed(hf, "intermediate_size", rule=rule)
    return ModelConfig.llama_like(hf, eps=1e-5, attention={"qk_norm": "width"}, feed_forward=lambda layer: moe)


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    return gguf.config(metadata, checkpoint, "olmoe", "OlmoeForCausalLM")


olmoe = Family(
    "olmoe",
    model_types=("olmoe",),
    config=config,
    names=NAMES,
    gguf=Gguf("olmoe", gguf.NAMES, _from_gguf),
    models="OLMoE",
)
