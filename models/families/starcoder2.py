"""StarCoder2: Llama with layer norms, a plain MLP, biases everywhere and a window."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, layer_norms
from ..fields import activation, flag
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.c_fc.weight",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.c_proj.weight",
}


def config(hf: Mapping) -> ModelConfig:
    bias = flag(hf, "use_bias", True)
    return ModelConfig.llama_like(
        hf,
        tied=True,
        attention={"bias": bias, "output_bias": bias},
        mlp={"gate": None, "bias": bias, "act": activation(hf, default="gelu_pytorch_tanh")},
        sliding=lambda layer: hf.get("sliding_window") is not None,
        **layer_norms(hf, "norm_epsilon"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "starcoder2", "Starcoder2ForCausalLM")
    return hf | {"use_bias": hf["attention_bias"], "norm_epsilon": hf.get("layer_norm_eps")}


starcoder2 = Family(
    "starcoder2", model_types=("starcoder2",), config=config, names=NAMES,
    gguf=Gguf("starcoder2", gguf.NAMES, _from_gguf),
    models="StarCoder2",
)  # fmt: skip
