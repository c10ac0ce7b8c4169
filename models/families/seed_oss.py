"""Seed-OSS: Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import flag, head_dim
from . import LLAMA, Family, Gguf, gguf

GGUF_NAMES = gguf.NAMES | {"layers.{i}.mlp_norm": "blk.{i}.post_attention_norm.weight"}


def config(hf: Mapping) -> ModelConfig:
    biases = {"bias": flag(hf, "attention_bias", True), "output_bias": flag(hf, "attention_out_bias")}
    return ModelConfig.llama_like({"num_key_value_heads": 8, **hf, "head_dim": head_dim(hf, 128)}, attention=biases)


_from_gguf = partial(gguf.config, model_type="seed_oss", architecture_class="SeedOssForCausalLM")

seed_oss = Family("seed_oss", ("seed_oss",), config, LLAMA, Gguf("seed_oss", GGUF_NAMES, _from_gguf), models="Seed-OSS")
