"""Helium: Llama with interleaved positions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import flag, head_dim
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    d = head_dim(hf, 128)
    return ModelConfig.llama_like(
        {"num_key_value_heads": 20, **hf, "head_dim": d},
        eps=1e-8,
        ropes={"main": rope(hf, d, base=100_000.0, interleaved=True)},
        attention={"bias": flag(hf, "attention_bias"), "output_bias": False},
    )


KIND = {"model_type": "helium", "architecture_class": "HeliumForCausalLM"}
_from_gguf = partial(gguf.config, **KIND, attention_bias=False)  # a Llama has its biases otherwise

helium = Family(  # a Llama to llama.cpp, whose pairs are interleaved too: what it has is read as one
    "helium", ("helium",), config, LLAMA, Gguf("llama", gguf.NAMES, _from_gguf, when=lambda metadata: False),
    models="Helium 1 2B",
)  # fmt: skip
