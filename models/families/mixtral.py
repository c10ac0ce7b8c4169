"""Mixtral: Mistral whose feed-forward is a router and experts."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, routed
from ..fields import head_dim
from ..ropes import rope
from . import LLAMA, Family, Gguf, experts, gguf

MODULE, MLP = "model.layers.{i}.block_sparse_moe", "model.layers.{i}.mlp"
ROUTER = {"layers.{i}.moe.router": (f"{MODULE}.gate.weight", f"{MLP}.gate.weight|module")}
NAMES = LLAMA | experts(MODULE, "w1", "w3", "w2", inside=MLP) | ROUTER


def config(hf: Mapping) -> ModelConfig:
    return ModelConfig.llama_like(
        hf,
        eps=1e-5,
        ropes={"main": rope(hf, head_dim(hf), base=1_000_000.0)},
        sliding=lambda layer: hf.get("sliding_window") is not None,
        feed_forward=lambda layer: routed(hf, "intermediate_size"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "mixtral", "MixtralForCausalLM")
    return hf | {"num_local_experts": hf.pop("num_experts", None)}


mixtral = Family(
    "mixtral", model_types=("mixtral",), config=config, names=NAMES,
    gguf=Gguf("llama", gguf.NAMES, _from_gguf, gguf.unpermute, when=gguf.has_experts),
    models="Mixtral",
)  # fmt: skip
