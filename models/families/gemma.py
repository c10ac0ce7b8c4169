"""Gemma 1: Llama with a scaled embedding, wide heads, gains stored minus one and a gated GELU."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import activation, head_dim, whole
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    act = activation({"act": hf.get("hidden_activation") or hf.get("hidden_act")}, "act", "gelu_pytorch_tanh")
    return ModelConfig.llama_like(
        {**hf, "head_dim": head_dim(hf, 256)},
        tied=True,
        mlp={"act": "gelu_tanh" if act == "gelu" else act},  # "gelu" was always meant so
        embed_scale=whole(hf, "hidden_size") ** 0.5,
        norm_offset=1.0,
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    return gguf.config(metadata, checkpoint, "gemma", "GemmaForCausalLM", hidden_activation="gelu_pytorch_tanh")


gemma = Family(
    "gemma", model_types=("gemma",), config=config, names=LLAMA,
    gguf=Gguf("gemma", gguf.NAMES, _from_gguf, arrange=gguf.minus_one),
    models="Gemma 1",
)  # fmt: skip
