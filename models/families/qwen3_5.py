"""Qwen3.5 (text): three of four layers keep a memory by the gated delta rule, the others attend, with a gate on each
head's answer; gains stored minus one. Its MoE has experts in every layer, and one that every token goes through."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ..config import DeltaConfig, ModelConfig, MoEConfig, plain_mlp, routed
from ..fields import each_layer, head_dim, whole
from ..ropes import rope
from . import LLAMA, Family, experts, shared_expert

DELTA = {
    "qkv": "in_proj_qkv.weight", "gate": "in_proj_z.weight", "a": "in_proj_a.weight", "b": "in_proj_b.weight",
    "taps": "conv1d.weight|kernels", "rate": "A_log", "shift": "dt_bias", "norm": "norm.weight",
    "out": "out_proj.weight", "qkv_gate": "in_proj_qkvz.weight", "b_a": "in_proj_ba.weight",
}  # fmt: skip
MLP = "model.layers.{i}.mlp"
NAMES = LLAMA | {
    f"layers.{{i}}.delta.{ours}": f"model.layers.{{i}}.linear_attn.{its}" for ours, its in DELTA.items()
}  # fmt: skip
MOE = NAMES | experts(MLP) | shared_expert(MLP) | {"layers.{i}.moe.router": f"{MLP}.gate.weight"}


def config(hf: Mapping) -> ModelConfig:
    every, d = whole(hf, "full_attention_interval", 4), head_dim(hf, 256)
    usual = {True: "full_attention", False: "linear_attention"}
    kinds = each_layer(hf, "layer_types", str, lambda i: usual[(i + 1) % every == 0])
    delta = DeltaConfig(
        key_heads=whole(hf, "linear_num_key_heads", 16),
        heads=whole(hf, "linear_num_value_heads", 32),
        key_dim=whole(hf, "linear_key_head_dim", 128),
        value_dim=whole(hf, "linear_value_head_dim", 128),
        taps=whole(hf, "linear_conv_kernel_dim", 4, least=2),
    )
    every_layer = plain_mlp(hf, bias=False) if hf.get("model_type") == "qwen3_5_text" else _experts(hf)
    return ModelConfig.llama_like(
        {**hf, "layer_types": None, "head_dim": d},
        ropes={"main": rope(hf, d, share=0.25)},
        attention={"qk_norm": "head", "gated": True},
        mixers=lambda i: delta if kinds[i] == "linear_attention" else None,
        feed_forward=lambda layer: every_layer,
        norm_offset=1.0,
    )


def _experts(hf: Mapping) -> MoEConfig:
    shared = plain_mlp(hf, hidden=whole(hf, "shared_expert_intermediate_size", 512), bias=False)
    return routed(hf, "moe_intermediate_size", rule=RouteRule(), shared=shared, shared_gate=True)


qwen3_5 = Family("qwen3_5", ("qwen3_5_text",), config, NAMES, models="Qwen3.5 (text)")
qwen3_5_moe = Family("qwen3_5_moe", ("qwen3_5_moe_text",), config, MOE, models="Qwen3.5-MoE (text)")
