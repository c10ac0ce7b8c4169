"""Toy: Llama with a norm on each head of q and k."""

from ondevice.models.config import ModelConfig
from ondevice.models.families import LLAMA, Family

NAMES = LLAMA | {
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
}


def config(hf):
    return ModelConfig.llama_like(hf, attention={"qk_norm": "head"})


toy = Family("toy", model_types=("toy",), config=config, names=NAMES)
