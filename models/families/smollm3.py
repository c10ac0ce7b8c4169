"""SmolLM3: Llama in which every fourth layer knows no positions."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import each_layer, flag, head_dim, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    every = whole(hf, "no_rope_layer_interval", 4)
    turning = each_layer(hf, "no_rope_layers", int, lambda i: (i + 1) % every)
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
