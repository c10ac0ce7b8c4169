"""Granite: Llama with multipliers of the embedding, of what each half of a block adds, of scores and of logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import number
from . import LLAMA, Family, Gguf, gguf

KEYS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def config(hf: Mapping) -> ModelConfig:
    return ModelConfig.llama_like(
        hf,
        scale=number(hf, "attention_multiplier", 1.0),
        layer={"residual_scale": number(hf, "residual_multiplier", 1.0)},
        embed_scale=number(hf, "embedding_multiplier", 1.0),
        logit_scale=1 / number(hf, "logits_scaling", 1.0),
    )


_from_gguf = partial(gguf.config, model_type="granite", architecture_class="GraniteForCausalLM", keys=KEYS)

granite = Family(
    "granite", model_types=("granite",), config=config, names=LLAMA,
    gguf=Gguf("granite", gguf.NAMES, _from_gguf, arrange=gguf.unpermute, keys=KEYS),
)  # fmt: skip
