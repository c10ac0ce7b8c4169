"""gpt-oss: experts with biases and a clamped gate, attention with sinks, a window in every other layer, yarn."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig, routed
from ..fields import head_dim, layer_count, number
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf

EXPERTS = "model.layers.{i}.mlp.experts"
HALVES = {"gate": "even", "up": "odd"}  # their rows in turn
NAMES = LLAMA | {
    "layers.{i}.attn.sinks": "model.layers.{i}.self_attn.sinks",
    "layers.{i}.moe.router": "model.layers.{i}.mlp.router.weight",
    "layers.{i}.moe.down": (
        f"{EXPERTS}.down_proj.weight|mlx", f"{EXPERTS}.down_proj|T|module", f"{EXPERTS}.down_proj_blocks",
    ),
    "layers.{i}.moe.down.bias": (f"{EXPERTS}.down_proj.bias|mlx", f"{EXPERTS}.down_proj_bias"),
    **{f"layers.{{i}}.moe.{ours}": (f"{EXPERTS}.{ours}_proj.weight|mlx", f"{EXPERTS}.gate_up_proj|T|{rows}|module",
       f"{EXPERTS}.gate_up_proj_blocks|{rows}") for ours, rows in HALVES.items()},
    **{f"layers.{{i}}.moe.{ours}.bias": (f"{EXPERTS}.{ours}_proj.bias|mlx", f"{EXPERTS}.gate_up_proj_bias|{rows}")
       for ours, rows in HALVES.items()},
}  # fmt: skip
GGUF_NAMES = gguf.NAMES | {
    "layers.{i}.attn.sinks": "blk.{i}.attn_sinks.weight",
    "layers.{i}.mlp_norm": "blk.{i}.post_attention_norm.weight",
}


def config(hf: Mapping) -> ModelConfig:
    if (number(hf, "swiglu_limit", 7.0), number(hf, "swiglu_alpha", 1.702)) != (7.0, 1.702):
        raise Unsupported("This gpt-oss clamps its experts otherwise than at 7, by 1.702.", "Take gpt-oss-20b.")
    hf = {"sliding_window": 128, "num_key_value_heads": 8, **hf, "head_dim": head_dim(hf, 64)}
    clamped = {"act": "clamped_swish", "up_act": "clamp", "up_offset": 1.0}
    moe = routed(hf, "intermediate_size", router_bias=True, bias=True, **clamped)
    return ModelConfig.llama_like(
        hf,
        eps=1e-5,
        ropes={"main": rope(hf, hf["head_dim"], base=150_000.0)},
        sliding=lambda layer: layer % 2 == 0,
        attention={"bias": True, "output_bias": True, "sinks": True},
        feed_forward=[moe] * layer_count(hf),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "gpt_oss", "GptOssForCausalLM")
    hf["rope_scaling"] = {**hf.get("rope_scaling", {}), "truncate": False} if "rope_scaling" in hf else None
    return hf | {"intermediate_size": hf.get("moe_intermediate_size"), "num_local_experts": hf.pop("num_experts", None)}


gpt_oss = Family("gpt_oss", ("gpt_oss",), config, NAMES, Gguf("gpt-oss", GGUF_NAMES, _from_gguf), models="gpt-oss")
