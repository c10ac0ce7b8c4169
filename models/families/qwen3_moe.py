"""Qwen3-MoE: Qwen3 whose feed-forward is a router and experts; some layers may stay plain."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ..config import MLPConfig, ModelConfig, MoEConfig
from ..fields import activation, contradiction, flag, layer_count, several, whole
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    "layers.{i}.moe.router": "model.layers.{i}.mlp.gate.weight",
} | {
    f"layers.{{i}}.moe.{part}": (
        f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj.weight",
        f"model.layers.{{i}}.mlp.switch_mlp.{part}_proj.weight",  # as mlx-lm stacks them
    )
    for part in ("gate", "up", "down")
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    experts = whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts")  # transformers 5 renamed it
    per_token = whole(hf, "num_experts_per_tok")
    if per_token > experts:
        raise contradiction(f"The config has {experts} experts and num_experts_per_tok = {per_token}.")
    act, rule = activation(hf), RouteRule(renormalise=flag(hf, "norm_topk_prob"))
    moe = MoEConfig(experts, per_token, whole(hf, "moe_intermediate_size"), act, rule)
    plain = MLPConfig(whole(hf, "intermediate_size"), act)
    every, dense = whole(hf, "decoder_sparse_step", 1), several(hf, "mlp_only_layers", int)
    windowed = flag(hf, "use_sliding_window")
    kinds = [plain if i in dense or (i + 1) % every else moe for i in range(layer_count(hf))]
    return ModelConfig.llama_like(hf, attention={"qk_norm": "head"}, sliding=lambda layer: windowed, feed_forward=kinds)


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "qwen3_moe", "Qwen3MoeForCausalLM", norm_topk_prob=True)
    return {
        "intermediate_size": whole(hf, "moe_intermediate_size"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    } | hf


qwen3_moe = Family(
    "qwen3_moe", model_types=("qwen3_moe",), config=config, names=NAMES, gguf=Gguf("qwen3moe", gguf.NAMES, _from_gguf)
)
