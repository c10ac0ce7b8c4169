"""ERNIE 4.5: Llama with interleaved positions; its MoE elects experts with a bias for the election alone, in some
layers, and has experts for all tokens besides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig, plain_mlp, routed
from ..fields import flag, head_dim, layer_count, number, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, experts, gguf, shared_expert

MLP = "model.layers.{i}.mlp"
NAMES = LLAMA | experts(MLP) | shared_expert(MLP, "shared_experts") | {
    "layers.{i}.moe.router": f"{MLP}.gate.weight",
    "layers.{i}.moe.election": f"{MLP}.moe_statics.e_score_correction_bias|unit",
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    bias, mixed = flag(hf, "use_bias"), hf.get("model_type") == "ernie4_5_moe"
    d = head_dim(hf, None if mixed else 128)
    plain = plain_mlp(hf, bias=bias)
    first, end = whole(hf, "moe_layer_start_index", 1, least=0), hf.get("moe_layer_end_index", -1)
    every, moe = whole(hf, "moe_layer_interval", 1), _experts(hf, bias) if mixed else plain
    last = layer_count(hf) - 1 if end in (-1, None) else whole(hf, "moe_layer_end_index")
    return ModelConfig.llama_like(
        {**hf, "head_dim": d},
        eps=1e-5,
        tied=True,
        ropes={"main": rope(hf, d, base=500_000.0, interleaved=True)},
        attention={"bias": bias, "output_bias": bias},
        feed_forward=lambda layer: moe if first <= layer <= last and (layer + 1) % every == 0 else plain,
        head_bias=bias and mixed,
    )


def _experts(hf: Mapping, bias: bool):
    counts = {"num_experts": whole(hf, "moe_num_experts", 64), "num_experts_per_tok": whole(hf, "moe_k", 6)}
    number(hf, "moe_norm_min", 1e-12)  # which no sum of gates comes near
    width = whole(hf, "moe_num_shared_experts", 2, least=0) * whole(hf, "moe_intermediate_size", 1536)
    shared = plain_mlp(hf, hidden=width, bias=bias) if width else None
    return routed(
        {"moe_intermediate_size": 1536, **hf, **counts}, "moe_intermediate_size", election=True, shared=shared
    )


_from_gguf = partial(gguf.config, model_type="ernie4_5", architecture_class="Ernie4_5ForCausalLM")

ernie4_5 = Family(
    "ernie4_5", ("ernie4_5",), config, LLAMA, Gguf("ernie4_5", gguf.NAMES, _from_gguf), models="ERNIE 4.5 0.3B"
)
KEYS = {
    "moe_num_experts": "expert_count",
    "moe_k": "expert_used_count",
    "moe_num_shared_experts": "expert_shared_count",
    "moe_layer_start_index": "leading_dense_block_count",
    "moe_layer_interval": "interleave_moe_layer_step",
}


def _moe_from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", keys=KEYS)
    return hf | {"use_bias": hf["attention_bias"]}


ernie4_5_moe = Family(
    "ernie4_5_moe", ("ernie4_5_moe",), config, NAMES,
    Gguf("ernie4_5-moe", gguf.NAMES, _moe_from_gguf, keys=KEYS, usual=lambda config: {"interleave_moe_layer_step": 1}),
    models="ERNIE 4.5 MoE (text)",
)  # fmt: skip
