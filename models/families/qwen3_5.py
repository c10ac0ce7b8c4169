"""Qwen3.5 (text): three of four layers keep a memory by the gated delta rule, the others attend, with a gate on each
head's answer; gains stored minus one. Its MoE has experts in every layer, and one that every token goes through."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ..config import DeltaConfig, ModelConfig, MoEConfig, plain_mlp, routed
from ..fields import each_layer, head_dim, several, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, experts, gguf, shared_expert

DELTA = {
    "qkv": "in_proj_qkv.weight", "gate": "in_proj_z.weight", "a": "in_proj_a.weight", "b": "in_proj_b.weight",
    "taps": "conv1d.weight|kernels", "rate": "A_log", "shift": "dt_bias", "norm": "norm.weight",
    "out": "out_proj.weight", "qkv_gate": "in_proj_qkvz.weight", "b_a": "in_proj_ba.weight",
}  # fmt: skip
MLP = "model.layers.{i}.mlp"
GAINS = ("norm", *(f"layers.{{i}}.{norm}" for norm in ("attn_norm", "mlp_norm", "attn.q_norm", "attn.k_norm")))
NAMES = LLAMA | {name: f"{LLAMA[name]}|raised" for name in GAINS} | {
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


PARTS = {
    "qkv": "attn_qkv.weight", "gate": "attn_gate.weight", "a": "ssm_alpha.weight", "b": "ssm_beta.weight",
    "taps": "ssm_conv1d.weight", "rate": "ssm_a", "shift": "ssm_dt.bias", "norm": "ssm_norm.weight",
    "out": "ssm_out.weight",
}  # fmt: skip
GGUF_NAMES = gguf.NAMES | {"layers.{i}.mlp_norm": "blk.{i}.post_attention_norm.weight"} | {
    f"layers.{{i}}.delta.{ours}": f"blk.{{i}}.{its}" for ours, its in PARTS.items()
}  # fmt: skip
KEYS = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "full_attention_interval": "full_attention_interval",
}


def from_gguf(metadata: Mapping, checkpoint, *kind: str) -> dict:
    hf = gguf.config(metadata, checkpoint, *kind, keys=KEYS)
    prefix = metadata["general.architecture"]
    inner = whole(metadata, f"{prefix}.ssm.inner_size")
    hf["linear_value_head_dim"] = inner // whole(hf, "linear_num_value_heads")
    remembers = several(metadata, f"{prefix}.attention.recurrent_layers", bool)[: hf["num_hidden_layers"]]
    kinds = {True: "linear_attention", False: "full_attention"}
    return hf | {"layer_types": [kinds[one] for one in remembers] or None}


def _sections(config: ModelConfig) -> dict:
    """Pairs of a head by which pictures tell time, height and width apart; for text the three are the same."""
    pairs = config.ropes["main"].dim // 2
    return {"rope.dimension_sections": [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]}


def _gguf(architecture: str, *kind: str) -> Gguf:
    def read(metadata: Mapping, checkpoint) -> dict:
        return from_gguf(metadata, checkpoint, *kind)

    arrange, rearrange = gguf.memory(gguf.in_turn)
    return Gguf(architecture, GGUF_NAMES, read, arrange, KEYS, rearrange=rearrange, usual=_sections)


qwen3_5 = Family(
    "qwen3_5", ("qwen3_5_text",), config, NAMES, _gguf("qwen35", "qwen3_5_text", "Qwen3_5ForCausalLM"),
    models="Qwen3.5 (text)",
)  # fmt: skip
qwen3_5_moe = Family(
    "qwen3_5_moe", ("qwen3_5_moe_text",), config, MOE, _gguf("qwen35moe", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    models="Qwen3.5-MoE (text)",
)  # fmt: skip
