"""Helium: Llama with interleaved positions."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import flag, head_dim
from ..ropes import rope
from . import LLAMA, Family


def config(hf: Mapping) -> ModelConfig:
    d = head_dim(hf, 128)
    return ModelConfig.llama_like(
        {"num_key_value_heads": 20, **hf, "head_dim": d},
        eps=1e-8,
        ropes={"main": rope(hf, d, base=100_000.0, interleaved=True)},
        attention={"bias": flag(hf, "attention_bias"), "output_bias": False},
    )


helium = Family("helium", ("helium",), config, LLAMA, models="Helium 1 2B")
