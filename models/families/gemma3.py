"""Gemma 3 (text): norms before and behind each half of a block, q/k norms, five windowed layers to each full one with a
rotary base of its own, a scaled embedding, gains stored minus one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ...backends.base import AttentionSpec
from ..config import LayerConfig, ModelConfig, activation, rope
from . import LLAMA, QK_NORM, Family, Gguf, gguf

NAMES = LLAMA | QK_NORM | {
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}  # fmt: skip
GGUF_NAMES = gguf.NAMES | {
    "layers.{i}.attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "layers.{i}.mlp_post_norm": "blk.{i}.post_ffw_norm.weight",
}


def config(hf: Mapping) -> ModelConfig:
    head_dim = hf.get("head_dim", 256)
    hf = {**hf, "head_dim": head_dim}
    plain = ModelConfig.llama_like(
        {**hf, "rope_parameters": None, "rope_scaling": None},
        qk_norm=True, act=activation(hf, "hidden_activation", "gelu_pytorch_tanh"), tied=True,
        embed_scale=float(hf["hidden_size"]) ** 0.5, norm_offset=1.0, logit_softcap=hf.get("final_logit_softcapping"),
    )  # fmt: skip
    scale, cap = hf.get("query_pre_attn_scalar", 256) ** -0.5, hf.get("attn_logit_softcapping")
    full = replace(plain.layers[0].attention, spec=AttentionSpec(scale, None, softcap=cap))
    local = replace(full, rope="local", spec=AttentionSpec(scale, hf.get("sliding_window", 4096), softcap=cap))
    sandwich = LayerConfig(full, plain.layers[0].feed_forward, post_norms=True)
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    kinds = hf.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(len(plain.layers))
    ]
    layers = tuple(sandwich if k == "full_attention" else replace(sandwich, attention=local) for k in kinds)
    return replace(plain, layers=layers, ropes=_ropes(hf, head_dim))


def _ropes(hf: Mapping, head_dim: int) -> dict:
    both = hf.get("rope_parameters") or {}
    if "full_attention" in both:
        main, local = ({"rope_parameters": both[k]} for k in ("full_attention", "sliding_attention"))
    else:
        main = {"rope_scaling": hf.get("rope_scaling"), "rope_theta": hf.get("rope_theta")}
        local = {"rope_theta": hf.get("rope_local_base_freq")}
    return {"main": rope(main, head_dim, 1_000_000.0), "local": rope(local, head_dim, 10_000.0)}


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    fill = partial(gguf.config, model_type="gemma3_text", architecture_class="Gemma3ForCausalLM")
    hf = fill(metadata, checkpoint)
    largest = hf["num_hidden_layers"] == 62  # the 27B model alone scales its scores by width per head
    scalar = hf["hidden_size"] // hf["num_attention_heads"] if largest else hf["head_dim"]
    return {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"} | hf


gemma3 = Family(
    "gemma3", model_types=("gemma3_text",), config=config, names=NAMES,
    gguf=Gguf("gemma3", GGUF_NAMES, _from_gguf, arrange=gguf.minus_one),
)  # fmt: skip
