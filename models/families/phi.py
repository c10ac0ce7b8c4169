"""Phi-1, 1.5 and 2: attention and MLP side by side behind one layer norm, biases everywhere, positions for half of each
head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ...errors import Unsupported
from ..config import ModelConfig, layer_norms
from ..fields import activation, flag, head_dim
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    "norm": "model.final_layernorm.weight",
    "layers.{i}.attn.o": "model.layers.{i}.self_attn.dense.weight",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.fc1.weight",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.fc2.weight",
}


def config(hf: Mapping) -> ModelConfig:
    if flag(hf, "qk_layernorm"):
        raise Unsupported("This Phi norms q and k, with biases.", "Take phi-2.")
    return ModelConfig.llama_like(
        hf,
        ropes={"main": rope(hf, head_dim(hf), share=0.5)},
        attention={"bias": True, "output_bias": True},
        mlp={"gate": None, "bias": True, "act": activation(hf, default="gelu_new")},
        layer={"parallel": True, "shared_norm": True},
        head_bias=True,
        **layer_norms(hf),
    )


_from_gguf = partial(gguf.config, model_type="phi", architecture_class="PhiForCausalLM")

phi = Family("phi", ("phi",), config, NAMES, Gguf("phi2", gguf.NAMES, _from_gguf), models="Phi-1, Phi-1.5, Phi-2")
