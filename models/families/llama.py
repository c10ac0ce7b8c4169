"""Llama, and what is Llama by another name: SmolLM2, TinyLlama, Yi, …"""

from __future__ import annotations

from functools import partial

from ..config import ModelConfig
from . import LLAMA, Family, Gguf, gguf

llama = Family(
    "llama",
    model_types=("llama",),
    config=ModelConfig.llama_like,
    names=LLAMA,
    gguf=Gguf(
        "llama",
        gguf.NAMES,
        partial(gguf.config, model_type="llama", architecture_class="LlamaForCausalLM"),
        arrange=gguf.unpermute,
        when=lambda metadata: not gguf.has_experts(metadata),
    ),
    models="Llama 1 to 3, SmolLM, SmolLM2, Falcon 3, TinyLlama, Yi",
)
