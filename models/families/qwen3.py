"""Qwen3: Llama with a norm on each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from . import LLAMA, QK_NORM, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    head_dim = hf.get("head_dim", 128)
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return ModelConfig.llama_like({**hf, "head_dim": head_dim, "sliding_window": window}, qk_norm=True)


qwen3 = Family(
    "qwen3",
    model_types=("qwen3",),
    config=config,
    names=LLAMA | QK_NORM,
    gguf=Gguf("qwen3", gguf.NAMES, partial(gguf.config, model_type="qwen3", architecture_class="Qwen3ForCausalLM")),
)
