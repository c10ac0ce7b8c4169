"""Ministral 3: Llama with yarn, whose queries grow with their position."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, Sharpness
from ..fields import head_dim, number, table, whole
from . import LLAMA, Family, Gguf, gguf

YARN = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    rule = table(hf, "rope_parameters") or YARN
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 262_144, **hf, "rope_parameters": rule}
    every = whole(rule, "original_max_position_embeddings", hf["max_position_embeddings"])
    return ModelConfig.llama_like(
        {**hf, "head_dim": head_dim(hf, 128), "layer_types": None},
        eps=1e-5,
        sliding=lambda layer: hf.get("sliding_window") is not None,
        attention={"sharpness": Sharpness(every, number(rule, "llama_4_scaling_beta", 0.0, least=0.0))},
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "ministral3", "Ministral3ForCausalLM")
    weight = number(metadata, "mistral3.rope.scaling.yarn_log_multiplier", 1.0, least=0.0)
    beta = number(metadata, "mistral3.attention.temperature_scale", 0.0, least=0.0)
    own = {"rope_theta": hf["rope_theta"], "mscale": weight, "mscale_all_dim": weight, "llama_4_scaling_beta": beta}
    return hf | {"rope_parameters": hf.pop("rope_scaling", {}) | own}


ministral3 = Family(
    "ministral3", ("ministral3",), config, LLAMA,
    Gguf("mistral3", gguf.NAMES, _from_gguf, gguf.unpermute), models="Ministral 3",
)  # fmt: skip
