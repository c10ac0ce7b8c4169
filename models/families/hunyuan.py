"""Hunyuan (dense): Llama with a norm on each head of q and k behind the positions, whose base `alpha` stretches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import head_dim, number, table
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.query_layernorm.weight",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.key_layernorm.weight",
}


def config(hf: Mapping) -> ModelConfig:
    d, rule = head_dim(hf), table(hf, "rope_parameters") or table(hf, "rope_scaling")
    if rule.get("alpha"):
        base = number(rule, "rope_theta", number(hf, "rope_theta", 10_000.0))
        stretched = base * number(rule, "alpha") ** (d / max(d - 2, 1))
        hf = {**hf, "rope_parameters": {"rope_theta": stretched}, "rope_scaling": None}
    return ModelConfig.llama_like(hf, eps=1e-5, attention={"qk_norm": "head", "norm_turned": True})


_from_gguf = partial(gguf.config, model_type="hunyuan_v1_dense", architecture_class="HunYuanDenseV1ForCausalLM")

hunyuan = Family(
    "hunyuan", ("hunyuan_v1_dense",), config, NAMES,
    Gguf("hunyuan-dense", gguf.NAMES, _from_gguf), models="Hunyuan 0.5B to 7B (dense)",
)  # fmt: skip
