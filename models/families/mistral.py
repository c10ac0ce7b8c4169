"""Mistral and Ministral: Llama with a window, in every layer or in some."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from . import LLAMA, Family


def config(hf: Mapping) -> ModelConfig:
    hf = {"sliding_window": 4096, "num_key_value_heads": 8, **hf}
    return ModelConfig.llama_like(hf, sliding=lambda layer: hf["sliding_window"] is not None)


mistral = Family(
    "mistral", model_types=("mistral", "ministral"), config=config, names=LLAMA, models="Mistral, Ministral"
)
