"""InternLM3: Llama, with biases on q, k and v where its file says `qkv_bias`, and elsewhere where it says `bias`."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import flag
from . import LLAMA, Family


def config(hf: Mapping) -> ModelConfig:
    hf = {"num_key_value_heads": 2, "head_dim": 128, **hf}
    biases = {"bias": flag(hf, "qkv_bias", flag(hf, "attention_bias"))}
    biases["output_bias"] = flag(hf, "bias", flag(hf, "attention_bias"))
    mlp = {"bias": flag(hf, "bias", flag(hf, "mlp_bias"))}
    return ModelConfig.llama_like(hf, eps=1e-5, attention=biases, mlp=mlp)


internlm3 = Family("internlm3", ("internlm3",), config, LLAMA, models="InternLM3")
