"""Phi-3, Phi-3.5 and Phi-4: Llama whose q, k and v are one matrix, and gate and up another; long texts by longrope."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import head_dim, table
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf

GGUF_NAMES = gguf.NAMES | {"layers.{i}.mlp.gate_up": "blk.{i}.ffn_up.weight"}


def config(hf: Mapping) -> ModelConfig:
    rule = dict(table(hf, "rope_parameters") or table(hf, "rope_scaling"))
    if rule.get("type") in ("su", "yarn"):  # what longrope was called at first
        rule["type"] = "longrope"
    hf = {"original_max_position_embeddings": 4096, **hf, "rope_parameters": rule}
    return ModelConfig.llama_like(
        hf,
        eps=1e-5,
        ropes={"main": rope(hf, head_dim(hf))},
        attention={"qkv": "fused"},
        mlp={"gate": "fused"},
        sliding=lambda layer: hf.get("sliding_window") is not None,
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "phi3", "Phi3ForCausalLM")
    hf["sliding_window"] = hf.get("sliding_window") or None  # 0: none
    return hf | gguf.rope_factors(metadata, checkpoint, hf)


phi3 = Family(
    "phi3",
    model_types=("phi3",),
    config=config,
    names=LLAMA,
    gguf=Gguf("phi3", GGUF_NAMES, _from_gguf),
    models="Phi-3, Phi-3.5, Phi-4",
)
