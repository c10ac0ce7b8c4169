"""DeepSeek V2 and V3: latent attention; the first layers plain, the others with experts, some for all tokens. V3 elects
experts by groups, with a bias for the election alone."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import AttentionSpec, RouteRule
from ...errors import Unsupported
from ..config import LatentConfig, ModelConfig, MoEConfig, elected, plain_mlp, routed, shared_mlp
from ..fields import flag, number, one_of, optional, whole
from ..ropes import RopeConfig, mscale, rope
from . import LLAMA, Family, Gguf, experts, gguf

MLP, ATTENTION = "model.layers.{i}.mlp", "model.layers.{i}.self_attn"
MODULES = {
    "q": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj", "o": "o_proj",
    "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm",
}  # fmt: skip
NAMES = LLAMA | experts(MLP) | {
    "layers.{i}.moe.router": f"{MLP}.gate.weight",
    "layers.{i}.moe.election": f"{MLP}.gate.e_score_correction_bias",
    "layers.{i}.latent.k_up": f"{ATTENTION}.kv_b_proj.weight|heads|first",
    "layers.{i}.latent.v_up": f"{ATTENTION}.kv_b_proj.weight|heads|last",
    **{f"layers.{{i}}.latent.{ours}": f"{ATTENTION}.{its}.weight" for ours, its in MODULES.items()},
    **{f"layers.{{i}}.moe.shared.{p}": f"{MLP}.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")},
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    if flag(hf, "attention_bias") or whole(hf, "moe_layer_freq", 1) > 1:
        raise Unsupported("This DeepSeek has biases in attention, or experts in some layers only.", "Take another.")
    turning, dense = whole(hf, "qk_rope_head_dim", 64), whole(hf, "first_k_dense_replace", 0, least=0)
    hf = {**hf, "head_dim": turning, "num_key_value_heads": None}
    turns = rope(hf, turning, interleaved=flag(hf, "rope_interleave", True))
    mixer, moe = _latent(hf, turns), _experts(hf)
    return ModelConfig.llama_like(
        hf,
        ropes={"main": turns},
        mixers=lambda layer: mixer,
        feed_forward=lambda layer: plain_mlp(hf) if layer < dense else moe,
    )


def _latent(hf: Mapping, turns: RopeConfig) -> LatentConfig:
    nope, rule = whole(hf, "qk_nope_head_dim", 128), turns.scaling
    scale = (nope + turns.dim) ** -0.5
    if sharper := number(rule, "mscale_all_dim", 0.0, least=0.0):  # long texts, in scores besides sine and cosine
        scale *= mscale(number(rule, "factor", 1.0), sharper) ** 2
    return LatentConfig(
        heads=whole(hf, "num_attention_heads"),
        nope=nope,
        turning=turns.dim,
        value_dim=whole(hf, "v_head_dim", 128),
        latent=whole(hf, "kv_lora_rank", 512),
        query_latent=optional(whole, hf, "q_lora_rank"),
        spec=AttentionSpec(scale),
    )


def _experts(hf: Mapping) -> MoEConfig:
    if hf.get("model_type") == "deepseek_v3":
        return elected(hf, shared=1, groups=8, top_groups=4, scale=2.5)
    one_of(hf, "topk_method", {"greedy": None}, "greedy")
    rule = RouteRule(renormalise=False, scale=number(hf, "routed_scaling_factor", 1.0))
    return routed(hf, "moe_intermediate_size", rule=rule, shared=shared_mlp(hf, 2))


GGUF_PARTS = {
    "q": "attn_q", "q_down": "attn_q_a", "q_norm": "attn_q_a_norm", "q_up": "attn_q_b", "o": "attn_output",
    "kv_down": "attn_kv_a_mqa", "kv_norm": "attn_kv_a_norm",
}  # fmt: skip
GGUF_NAMES = gguf.NAMES | {
    "layers.{i}.latent.k_up": ("blk.{i}.attn_k_b.weight|T", "blk.{i}.attn_kv_b.weight|first"),
    "layers.{i}.latent.v_up": ("blk.{i}.attn_v_b.weight", "blk.{i}.attn_kv_b.weight|last"),
    **{f"layers.{{i}}.latent.{ours}": f"blk.{{i}}.{its}.weight" for ours, its in GGUF_PARTS.items()},
}
KEYS = {
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
SIGMOID = 2  # llama.cpp's number of that gate


def _from_gguf(metadata: Mapping, checkpoint, *kind: str) -> dict:
    hf = gguf.config(metadata, checkpoint, *kind, keys=KEYS)
    key, value = (
        whole(metadata, f"deepseek2.attention.{part}_length_mla", metadata.get(f"deepseek2.attention.{part}_length"))
        for part in ("key", "value")
    )
    del hf["partial_rotary_factor"]
    hf |= {"qk_nope_head_dim": key - whole(hf, "qk_rope_head_dim"), "v_head_dim": value, "rope_interleave": True}
    if rule := hf.get("rope_scaling"):
        sharper = number(metadata, "deepseek2.rope.scaling.yarn_log_multiplier", 0.0, least=0.0) * 10
        hf["rope_scaling"] = rule | {"mscale": sharper, "mscale_all_dim": sharper}
    groups = {"n_group": hf.get("n_group", 1), "topk_group": hf.get("topk_group", 1)}
    return hf | groups | {"head_dim": None}


def _gguf(third: bool, *kind: str) -> Gguf:
    def ours(metadata: Mapping) -> bool:
        return (metadata.get("deepseek2.expert_gating_func") == SIGMOID) == third

    return Gguf("deepseek2", GGUF_NAMES, lambda m, checkpoint: _from_gguf(m, checkpoint, *kind), keys=KEYS, when=ours)


deepseek_v2 = Family(
    "deepseek_v2", ("deepseek_v2",), config, NAMES, _gguf(False, "deepseek_v2", "DeepseekV2ForCausalLM"),
    models="DeepSeek V2 Lite, DeepSeek Coder V2 Lite",
)  # fmt: skip
deepseek_v3 = Family(
    "deepseek_v3", ("deepseek_v3",), config, NAMES, _gguf(True, "deepseek_v3", "DeepseekV3ForCausalLM"),
    models="DeepSeek V3, Moonlight",
)  # fmt: skip
