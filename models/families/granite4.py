"""Granite 4 without Mamba (350M, 1B, Micro): Granite whose gate and up are one matrix; some know no positions."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig, plain_mlp
from ..fields import number, several, whole
from . import LLAMA, Family, joined

MLP = "model.layers.{i}.shared_mlp"
NAMES = LLAMA | joined("mlp", (f"{MLP}.input_linear.weight", f"{MLP}.output_linear.weight"), mlx="model.layers.{i}.mlp")


def config(hf: Mapping) -> ModelConfig:
    kinds, turns = several(hf, "layer_types", str), hf.get("position_embedding_type") == "rope"
    if not kinds or {*kinds} - {"attention", "full_attention"} or whole(hf, "num_local_experts", 8, least=0):
        raise Unsupported("This Granite 4 has Mamba layers or experts.", "Take granite-4.0-350m, 1b or micro.")
    return ModelConfig.llama_like(
        {**hf, "layer_types": None},
        scale=number(hf, "attention_multiplier", 1.0),
        turns=lambda layer, slides: turns,
        mlp=vars(plain_mlp(hf, hidden=whole(hf, "shared_intermediate_size", 1024), bias=False)),
        layer={"residual_scale": number(hf, "residual_multiplier", 1.0)},
        input_scale=number(hf, "embedding_multiplier", 1.0),
        logit_scale=1 / number(hf, "logits_scaling", 1.0),
    )


granite4 = Family("granite4", ("granitemoehybrid",), config, NAMES, models="Granite 4 350M, 1B, Micro")
