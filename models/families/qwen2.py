"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import flag, whole
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    first = whole(hf, "max_window_layers", 28, least=0) if flag(hf, "use_sliding_window") else None
    return ModelConfig.llama_like(
        {"sliding_window": 4096, **hf},
        attention={"bias": True, "output_bias": False},
        sliding=lambda layer: first is not None and layer >= first,
    )


qwen2 = Family(
    "qwen2",
    model_types=("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text"),
    config=config,
    names=LLAMA,
    gguf=Gguf(
        "qwen2",
        gguf.NAMES,
        partial(gguf.config, model_type="qwen2", architecture_class="Qwen2ForCausalLM"),
        also=("qwen2vl",),
    ),
    models="Qwen2, Qwen2.5, the text of Qwen2-VL and 2.5-VL",
)
