"""Qwen3: Llama with a norm on each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import flag, head_dim, whole
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    first = whole(hf, "max_window_layers", 28, least=0) if flag(hf, "use_sliding_window") else None
    return ModelConfig.llama_like(
        {**hf, "head_dim": head_dim(hf, 128)},
        attention={"qk_norm": "head"},
        sliding=lambda layer: first is not None and layer >= first,
    )


qwen3 = Family(
    "qwen3",
    model_types=("qwen3", "qwen3_vl_text"),
    config=config,
    names=LLAMA,
    gguf=Gguf(
        "qwen3",
        gguf.NAMES,
        partial(gguf.config, model_type="qwen3", architecture_class="Qwen3ForCausalLM"),
        also=("qwen3vl",),
    ),
    models="Qwen3, the text of Qwen3-VL",
)
