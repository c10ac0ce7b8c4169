"""Llama 4 (text): three of four layers attend within chunks, the fourth to all but without positions, sharper the
longer the text; experts in all layers or in some, chosen by a sigmoid that scales their input."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ..config import ModelConfig, Sharpness, plain_mlp, routed
from ..fields import each_layer, flag, head_dim, number, optional, several, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf, joined, shared_expert

MLP, EXPERTS, TURNED = "model.layers.{i}.feed_forward", "model.layers.{i}.feed_forward.experts", "|T|module|swapped"
NAMES = LLAMA | shared_expert(MLP) | {
    **{f"layers.{{i}}.mlp.{part}": f"{MLP}.{part}_proj.weight" for part in ("gate", "up", "down")},
    "layers.{i}.moe.router": f"{MLP}.router.weight",
    **joined("moe", (f"{EXPERTS}.gate_up_proj{TURNED}", f"{EXPERTS}.down_proj{TURNED}"), mlx=EXPERTS),
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    every, step = whole(hf, "no_rope_layer_interval", 4), whole(hf, "interleave_moe_layer_step", 1)
    chunk = optional(whole, {"attention_chunk_size": 8192, **hf}, "attention_chunk_size")
    turning = each_layer(hf, "no_rope_layers", int, lambda i: (i + 1) % every)
    kinds = each_layer(hf, "layer_types", str, lambda i: "chunked_attention" if turning[i] else "full")
    sharp = Sharpness(whole(hf, "floor_scale", 8192), number(hf, "attn_scale", 0.1), ahead=1)
    tuned = {"sharpness": sharp} if flag(hf, "attn_temperature_tuning", True) else {}
    rule = RouteRule("sigmoid", renormalise=False, gate_on_input=True)
    moe = routed({"num_experts_per_tok": 1, **hf}, "intermediate_size", rule=rule, shared=plain_mlp(hf, bias=False))
    dense = plain_mlp({**hf, "intermediate_size": hf.get("intermediate_size_mlp", 16384)}, bias=False)
    mixed = range(step - 1, len(kinds), step) if hf.get("moe_layers") is None else several(hf, "moe_layers", int)
    return ModelConfig.llama_like(
        {"num_key_value_heads": 8, **hf, "layer_types": None, "head_dim": head_dim(hf, 128)},
        eps=1e-5,
        ropes={"main": rope(hf, head_dim(hf, 128), base=500_000.0, interleaved=True)},
        sliding=lambda layer: chunk is not None and kinds[layer] == "chunked_attention",
        local={"chunk": chunk},
        attention={"qk_norm": "bare" if flag(hf, "use_qk_norm", True) else None, "norm_turned": True},
        by_layer=lambda layer, slides: {} if turning[layer] else {"rope": None, "qk_norm": None, **tuned},
        feed_forward=lambda layer: moe if layer in mixed else dense,
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    keys = {"interleave_moe_layer_step": "interleave_moe_layer_step", "intermediate_size_mlp": "feed_forward_length"}
    hf = gguf.config(metadata, checkpoint, "llama4_text", "Llama4ForCausalLM", keys=keys)
    experts = hf.pop("num_experts", None)
    return hf | {
        "num_local_experts": experts,
        "intermediate_size": hf.get("moe_intermediate_size"),
        "use_qk_norm": experts != 128,
    }


llama4 = Family(
    "llama4", ("llama4_text",), config, NAMES, Gguf("llama4", gguf.NAMES, _from_gguf), models="Llama 4 Scout, Maverick"
)
