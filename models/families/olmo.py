"""OLMo 1: Llama whose layer norms have neither gains nor biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ...errors import Unsupported
from ..config import ModelConfig
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    if hf.get("clip_qkv") is not None:
        raise Unsupported("This OLMo clips q, k and v (clip_qkv), which is not computed here.", "Take OLMo-1B or 0724.")
    return ModelConfig.llama_like(hf, norm="bare", norm_eps=1e-5)


KEYS = {"clip_qkv": "attention.clamp_kqv"}
_from_gguf = partial(gguf.config, model_type="olmo", architecture_class="OlmoForCausalLM", keys=KEYS)

olmo = Family(
    "olmo", ("olmo",), config, LLAMA, Gguf("olmo", gguf.NAMES, _from_gguf, gguf.unpermute, KEYS), models="OLMo 1"
)
