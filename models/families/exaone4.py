"""EXAONE 4: norms behind each half of a block instead of in front, and on each head of q and k; where layers have a
window, those without know no positions."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import whole
from . import SANDWICH, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    hf = {"sliding_window": 4096, **hf}
    windowed, pattern = hf["sliding_window"] is not None, hf.get("sliding_window_pattern", 4)
    every = len(pattern) if isinstance(pattern, str) else whole({"every": pattern or 1}, "every")
    return ModelConfig.llama_like(
        hf,
        eps=1e-5,
        sliding=lambda layer: windowed and (layer + 1) % every != 0,
        turns=lambda layer, slides: slides or not windowed,
        attention={"qk_norm": "head"},
        layer={"pre_norms": False, "post_norms": True},
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "exaone4", "Exaone4ForCausalLM")
    kinds = hf.pop("sliding_window_pattern", None)
    if isinstance(kinds, list):
        hf["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in kinds]
    return {"sliding_window": None} | hf


exaone4 = Family(
    "exaone4", ("exaone4",), config, SANDWICH, Gguf("exaone4", gguf.SANDWICH, _from_gguf), models="EXAONE 4"
)
