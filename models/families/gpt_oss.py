"""gpt-oss: experts with biases and a clamped gate, attention with sinks, a window in every other layer, yarn."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig, routed
from ..fields import head_dim, number
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf, joined

EXPERTS = "model.layers.{i}.mlp.experts"
APART = {"mlx": EXPERTS, "rows": ("even", "odd")}  # in files gate's and up's in turn
STORED = [(f"{EXPERTS}.gate_up_proj{how}", f"{EXPERTS}.down_proj{how}") for how in ("|T|module", "_blocks", "_bias")]
NAMES = LLAMA | joined("moe", *STORED[:2], **APART) | joined("moe", STORED[2], **APART, end=".bias") | {
    "layers.{i}.attn.sinks": "model.layers.{i}.self_attn.sinks",
    "layers.{i}.moe.router": "model.layers.{i}.mlp.router.weight",
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
        feed_forward=lambda layer: moe,
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "gpt_oss", "GptOssForCausalLM")
    hf["rope_scaling"] = {**hf.get("rope_scaling", {}), "truncate": False} if "rope_scaling" in hf else None
    return hf | {"intermediate_size": hf.get("moe_intermediate_size"), "num_local_experts": hf.pop("num_experts", None)}


gpt_oss = Family("gpt_oss", ("gpt_oss",), config, NAMES, Gguf("gpt-oss", GGUF_NAMES, _from_gguf), models="gpt-oss")
