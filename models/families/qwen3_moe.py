"""Qwen3-MoE: Qwen3 whose feed-forward is a router and experts; some layers may stay plain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ...backends.base import RouteRule
from ..config import MLPConfig, ModelConfig, MoEConfig, activation, need
from . import LLAMA, QK_NORM, Family, Gguf, gguf

NAMES = LLAMA | QK_NORM | {
    "layers.{i}.moe.router": "model.layers.{i}.mlp.gate.weight",
} | {
    f"layers.{{i}}.moe.{part}": (
        f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj.weight",
        f"model.layers.{{i}}.mlp.switch_mlp.{part}_proj.weight",  # as mlx-lm stacks them
    )
    for part in ("gate", "up", "down")
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    act = activation(hf)
    rule = RouteRule(renormalise=hf.get("norm_topk_prob", False))
    moe = MoEConfig(
        need(hf, "num_experts"), need(hf, "num_experts_per_tok"), need(hf, "moe_intermediate_size"), act, rule
    )
    plain = MLPConfig(need(hf, "intermediate_size"), act)
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    kinds = (plain if i in dense or (i + 1) % step else moe for i in range(need(hf, "num_hidden_layers")))
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return ModelConfig.llama_like({**hf, "sliding_window": window}, qk_norm=True, feed_forward=tuple(kinds))


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    fill = partial(gguf.config, model_type="qwen3_moe", architecture_class="Qwen3MoeForCausalLM", norm_topk_prob=True)
    hf = fill(metadata, checkpoint)
    return {"intermediate_size": hf["moe_intermediate_size"], "decoder_sparse_step": 1, "mlp_only_layers": []} | hf


qwen3_moe = Family(
    "qwen3_moe", model_types=("qwen3_moe",), config=config, names=NAMES, gguf=Gguf("qwen3moe", gguf.NAMES, _from_gguf)
)
