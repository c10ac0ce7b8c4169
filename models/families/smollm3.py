"""SmolLM3: Llama in which every fourth layer knows no positions."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import contradiction, flag, head_dim, layer_count, several, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    every, count = whole(hf, "no_rope_layer_interval", 4), layer_count(hf)
    turning = several(hf, "no_rope_layers", int) or [(i + 1) % every for i in range(count)]
    if len(turning) != count:
        raise contradiction(f"The config has num_hidden_layers = {count} and {len(turning)} no_rope_layers.")
    if not flag(hf, "use_sliding_window"):
        hf = {**hf, "layer_types": None}
    return ModelConfig.llama_like(
        {"num_key_value_heads": 4, **hf},
        tied=True,
        ropes={"main": rope(hf, head_dim(hf), base=2_000_000.0)},
        sliding=lambda layer: flag(hf, "use_sliding_window") and not turning[layer],
        turns=lambda layer, slides: bool(turning[layer]),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    return gguf.config(metadata, checkpoint, "smollm3", "SmolLM3ForCausalLM", no_rope_layer_interval=4)


smollm3 = Family(
    "smollm3", model_types=("smollm3",), config=config, names=LLAMA,
    gguf=Gguf("smollm3", gguf.NAMES, _from_gguf, arrange=gguf.unpermute),
    models="SmolLM3",
)  # fmt: skip
