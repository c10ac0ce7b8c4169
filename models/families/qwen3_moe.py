"""Qwen2-MoE and Qwen3-MoE: Qwen whose feed-forward is a router and experts; some layers may stay plain. Qwen2-MoE has
an expert that every token goes through, weighted by a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...backends.base import RouteRule
from ..config import ModelConfig, plain_mlp, routed
from ..fields import flag, several, whole
from . import LLAMA, Family, Gguf, experts, gguf, joined, shared_expert

MLP = "model.layers.{i}.mlp"
NAMES = LLAMA | experts(MLP) | {"layers.{i}.moe.router": f"{MLP}.gate.weight"} | shared_expert(MLP)

# turned where the files are older than transformers 5
STACKED = (f"{MLP}.experts.gate_up_proj|T", f"{MLP}.experts.down_proj|T")
SEEING = NAMES | joined(
    "moe", STACKED, tuple(place.replace("|T", "|module") for place in STACKED), mlx=f"{MLP}.switch_mlp"
)


def config(hf: Mapping) -> ModelConfig:
    second, sees = hf.get("model_type") == "qwen2_moe", hf.get("model_type") == "qwen3_vl_moe_text"
    shared = plain_mlp(hf, hidden=whole(hf, "shared_expert_intermediate_size", 5632), bias=False) if second else None
    rule = RouteRule(renormalise=flag(hf, "norm_topk_prob", sees))
    moe = routed(hf, "moe_intermediate_size", rule=rule, shared=shared, shared_gate=second)
    every, dense = whole(hf, "decoder_sparse_step", 1), several(hf, "mlp_only_layers", int)
    plain, windowed = plain_mlp(hf, bias=False), flag(hf, "use_sliding_window")
    biases = {"bias": flag(hf, "qkv_bias", True), "output_bias": False}
    return ModelConfig.llama_like(
        hf,
        attention=biases if second else {"qk_norm": "head"},
        sliding=lambda layer: windowed,
        feed_forward=lambda layer: plain if layer in dense or (layer + 1) % every else moe,
    )


def _gguf(architecture: str, *kind: str, also: Sequence[str] = (), **more) -> Gguf:
    def read(metadata: Mapping, checkpoint) -> dict:
        hf = gguf.config(metadata, checkpoint, *kind, decoder_sparse_step=1, mlp_only_layers=[], **more)
        return {"intermediate_size": hf.get("moe_intermediate_size")} | hf

    return Gguf(architecture, gguf.NAMES, read, also=tuple(also))


qwen2_moe = Family(
    "qwen2_moe",
    ("qwen2_moe",),
    config,
    NAMES,
    _gguf("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM"),
    models="Qwen1.5-MoE, Qwen2-MoE",
)
qwen3_moe = Family(
    "qwen3_moe", ("qwen3_moe",), config, NAMES,
    _gguf("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", also=["qwen3vlmoe"], norm_topk_prob=True),
    models="Qwen3-MoE",
)  # fmt: skip
qwen3_vl_moe = Family("qwen3_vl_moe", ("qwen3_vl_moe_text",), config, SEEING, models="Qwen3-VL-MoE (text)")
