"""PhiMoE: Mixtral with layer norms, biases, longrope, and gates by the sparsemixer."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ..config import ModelConfig, layer_norms, routed
from ..fields import flag, head_dim, number
from ..ropes import rope
from . import Family, Gguf, gguf
from .mixtral import MLP, MODULE
from .mixtral import NAMES as MIXTRAL

NAMES = MIXTRAL | {"layers.{i}.moe.router": (f"{MODULE}.gate.weight", f"{MLP}.router.weight|module")}


def config(hf: Mapping) -> ModelConfig:
    rule = RouteRule("sparsemixer", renormalise=False, jitter=number(hf, "router_jitter_noise", 0.01))
    moe = routed({"num_experts_per_tok": 2, **hf}, "intermediate_size", rule=rule)
    return ModelConfig.llama_like(
        hf,
        ropes={"main": rope(hf, head_dim(hf), base=1_000_000.0)},
        sliding=lambda layer: hf.get("sliding_window") is not None,
        feed_forward=lambda layer: moe,
        head_bias=flag(hf, "lm_head_bias"),
        **layer_norms(hf, "rms_norm_eps"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "phimoe", "PhimoeForCausalLM", lm_head_bias="output.bias" in checkpoint)
    hf |= gguf.rope_factors(metadata, checkpoint, hf)
    return hf | {"sliding_window": hf.get("sliding_window") or None, "num_local_experts": hf.pop("num_experts", None)}


phimoe = Family(
    "phimoe", ("phimoe",), config, NAMES,
    Gguf("phimoe", gguf.NAMES, _from_gguf,
         differs="weighs PhiMoE's experts by a softmax, not by the sparsemixer that they were trained with"),
    models="Phi-3.5-MoE",
)  # fmt: skip
