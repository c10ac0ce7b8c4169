"""OLMo 2 and 3: norms behind each half of a block instead of in front, and one of all heads of q and of k together;
OLMo 3 has a window in three of four layers."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import head_dim, number
from ..ropes import rope, ropes_by_window
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def config(hf: Mapping) -> ModelConfig:
    third, d = hf.get("model_type") == "olmo3", head_dim(hf)
    base = number(hf, "rope_theta", 500_000.0)
    return ModelConfig.llama_like(
        {"sliding_window": 4096, **hf},
        eps=1e-5,
        ropes=ropes_by_window(hf, d, base, base) if third else {"main": rope(hf, d)},
        sliding=lambda layer: third and (layer + 1) % 4 != 0,
        attention={"qk_norm": "width"},
        layer={"pre_norms": False, "post_norms": True},
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    third = "olmo2.attention.sliding_window" in metadata
    kind = ("olmo3", "Olmo3ForCausalLM") if third else ("olmo2", "Olmo2ForCausalLM")
    return gguf.config(metadata, checkpoint, *kind)


olmo2 = Family(
    "olmo2",
    model_types=("olmo2", "olmo3"),
    config=config,
    names=NAMES,
    gguf=Gguf("olmo2", gguf.SANDWICH, _from_gguf),
    models="OLMo 2, OLMo 3",
)
